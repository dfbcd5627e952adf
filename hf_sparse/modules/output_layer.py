"""The output layer of a model, which leaves out logits while somebody looks at the largest alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from hf_sparse.modules.decoding_linear import DecodingLinear, of_ours


class LogitsFor(Protocol):
    """Who asks for logits, and in what way."""

    layer: OutputLayer

    def logits(self, x: Tensor) -> Tensor:
        """``x [..., D]``, what reaches the layer, to ``[..., V]``."""

    def product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The same for a product in a graph, if ``weight`` is that of the layer; else None."""


_asking: ContextVar[LogitsFor | None] = ContextVar("hf_sparse_logits_for", default=None)


@contextmanager
def asking(one: LogitsFor) -> Iterator[None]:
    """In here, in this thread or task, its layer calls ``one``."""
    token = _asking.set(one)
    try:
        yield
    finally:
        _asking.reset(token)


def asked() -> LogitsFor | None:
    """Who asks here and now."""
    return _asking.get()


@of_ours
class OutputLayer(DecodingLinear):
    """A :class:`DecodingLinear`, but for those who are :func:`asking` in another way."""

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., D]`` to ``[..., V]``, any dtype."""
        one = None if torch.compiler.is_compiling() else asked()
        if one is None or one.layer is not self:
            return super().forward(input)
        return one.logits(input)
