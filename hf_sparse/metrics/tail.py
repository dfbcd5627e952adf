"""Running a model without the tails of its MLP blocks: neurons that add little to the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hf_sparse.adapters import Block
from hf_sparse.adapters.pruning import column_norms
from hf_sparse.metrics.cett import contributions, down_weight, readable_down


@contextmanager
def without_tails(blocks: Sequence[Block], thresholds: Sequence[float]) -> Iterator[None]:
    """In here, h of each block is 0 where its contribution ``|h_j| |W_down[:, j]|`` is at most the threshold.

    The model is not changed: hooks do it, and patched blocks run dense meanwhile. An observer that is entered
    in here sees the zeros.

    Raises:
        PatchError: a block has no down projection that can be read.

    """
    with ExitStack() as stack:
        for block, threshold in zip(blocks, thresholds, strict=True):
            hook = _Hook(column_norms(down_weight(block)), threshold)
            handle = readable_down(block).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _Hook:
    def __init__(self, norms: Tensor, threshold: float) -> None:
        self._norms, self._threshold = norms, threshold

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._kept(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._kept(kwargs[name])}

    def _kept(self, h: Tensor) -> Tensor:
        return h.masked_fill(contributions(h, self._norms.to(h.device)) <= self._threshold, 0)
