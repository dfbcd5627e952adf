"""What is known of weights when an operator runs, for graphs, which were compiled before.

A certificate is true of a weight as it is just now. A graph has the tensors that it was compiled with, and
torch's compiler keeps references to weights. So whoever runs a graph can be asked by the operators in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from triton_ops.certificate import Certificate

tell: Callable[[bytes, int], None] | None = None
"""Tells operators in C++, which ask nobody, what weights they are to leave to those in Python: takes their
addresses and how many there are, and holds in this thread. None while there are no such operators."""


class Adviser(Protocol):
    """Who is asked."""

    @property
    def addresses(self) -> bytes:
        """Of the weights that there is advice for now, int64, in ascending order; others may go without."""

    def certificate(self, weight: Tensor) -> Certificate | None:
        """That of the deciding projection ``[F, D]`` of an MLP as it is, if it is to be used for a token."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """What a dense product of ``x [..., F]`` with ``weight [D, F]`` is to give; None: itself."""


_adviser: ContextVar[Adviser | None] = ContextVar("hf_sparse_adviser", default=None)


@contextmanager
def advised_by(adviser: Adviser | None) -> Iterator[None]:
    """In here, in this thread or task, operators of graphs on the CPU ask ``adviser``, or nobody."""
    token = _adviser.set(adviser)
    try:
        _tell()
        yield
    finally:
        _adviser.reset(token)
        _tell()


def _tell() -> None:
    if tell is not None:
        one = _adviser.get()
        addresses = b"" if one is None else one.addresses
        tell(addresses, len(addresses) // 8)


def adviser() -> Adviser | None:
    """Who is to be asked now."""
    return _adviser.get()
