"""What is known of weights when an operator runs, for graphs, which were compiled before.

A certificate is true of a weight as it is just now. A graph has the tensors that it was compiled with, and
torch's compiler keeps references to weights. So whoever runs a graph can be asked by the operators in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from triton_ops.certificate import Certificate


class Adviser(Protocol):
    """Who is asked."""

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
        yield
    finally:
        _adviser.reset(token)


def adviser() -> Adviser | None:
    """Who is to be asked now."""
    return _adviser.get()
