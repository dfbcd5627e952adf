"""How much each linear layer of a layer is pruned: the greedy allocation of TEAL (arXiv 2408.14690)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters import Block
from hf_sparse.adapters.pruning import Pruning
from hf_sparse.observing import BlockObserver

STEP = 0.05
"""What the sparsity of the largest linear layer grows by in a round; of smaller ones by as many weights."""
_MOST = 0.95


class LayerInputs(BlockObserver):
    """Keeps what one layer is called with in the first batch."""

    def __init__(self, block: Block, layer: nn.Module) -> None:
        super().__init__(block)
        self.layer = layer
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._padding: Tensor | None = None

    def _watch(self) -> Iterator[RemovableHandle]:
        yield self.layer.register_forward_pre_hook(self._called, with_kwargs=True)

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.call is None:
            self.call, self._padding = (args, kwargs), self.mask

    def tokens(self, output: Tensor) -> Tensor:
        """The rows of what the layer gave for that call that are no padding."""
        return self._text(output, None, self._padding)


def path(
    seen: LayerInputs,
    linears: Sequence[nn.Linear],
    prunings: Sequence[Callable[[float], Pruning]],
    norms: Sequence[Tensor | None],
    most: float,
) -> list[tuple[float, tuple[float, ...]]]:
    """Allocations of growing sparsity: the share of the layer's weights, and that of each linear layer.

    From none on, each round prunes one linear layer more: that which changes the output of the layer least,
    by the mean norm of the difference over the tokens of one batch. Rounds go on until ``most`` is reached.

    Args:
        seen: what the layer was called with.
        linears: those in it; the model is as its thresholds were read from, without gradient.
        prunings: for each, what leaves out a share.
        norms: for each, those of its columns if that is weighted.
        most: the sparsity to reach.

    """
    assert seen.call is not None
    args, kwargs = seen.call
    sizes = [one.in_features * one.out_features for one in linears]
    steps = [STEP * max(sizes) / size for size in sizes]
    chosen: list[Pruning | None] = [None] * len(linears)

    def pruned(index: int) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> Any:
            one = chosen[index]
            return given if one is None else (one.values(given[0], norms[index]), *given[1:])

        return hook

    def output() -> Tensor:
        result = seen.layer(*args, **kwargs)
        return seen.tokens(result[0] if isinstance(result, tuple) else result).float()

    found = [(0.0, (0.0,) * len(linears))]
    target = output()
    hooks = [one.register_forward_pre_hook(pruned(i)) for i, one in enumerate(linears)]
    try:
        while found[-1][0] < most:
            shares = found[-1][1]
            errors: list[tuple[float, int, tuple[float, ...]]] = []
            for i, share in enumerate(shares):
                if share >= _MOST:
                    continue
                more = (*shares[:i], min(share + steps[i], _MOST), *shares[i + 1 :])
                before, chosen[i] = chosen[i], prunings[i](more[i])
                errors.append((float((output() - target).norm(dim=-1).mean()), i, more))
                chosen[i] = before
            if not errors:
                break
            _, i, shares = min(errors)
            chosen[i] = prunings[i](shares[i])
            total = sum(share * size for share, size in zip(shares, sizes, strict=True))
            found.append((total / sum(sizes), shares))
    finally:
        for handle in hooks:
            handle.remove()
    return found


def at(allocations: Sequence[tuple[float, tuple[float, ...]]], level: float) -> tuple[float, ...]:
    """The shares of each linear layer where the layer's is ``level``, between rounds by a line."""
    for (low, before), (high, after) in pairwise(allocations):
        if level <= high:
            part = torch.lerp(torch.tensor(before), torch.tensor(after), (level - low) / (high - low))
            return tuple(part.tolist())
    return allocations[-1][1]
