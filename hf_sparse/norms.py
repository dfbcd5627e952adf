"""The norm that an MLP block is given the output of, found in a forward, and how its weight scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.adapters.copies import in_use, place
from hf_sparse.rehearsal import Rehearsal

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm or RMSNorm: ``gain * normalised(x) + bias``, of ``gain`` 1 if it has no weight."""

    name: str
    module: nn.Module
    """Sharding exchanges its parameters; so it is asked for them each time."""
    offset: float
    """The gain is ``offset + weight``: 1 where a weight of 0 is the identity, as in Gemma."""

    @property
    def weight(self) -> nn.Parameter | None:
        """``[D]``; None if it has none."""
        return self.module._parameters.get("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        """``[D]``; None if it has none."""
        return self.module._parameters.get("bias")

    def whole_gain(self) -> Tensor | None:
        """``[D]``, all of it in every process; None if it has no weight."""
        weight = self.weight
        if weight is None:
            return None
        gain = weight.detach() + self.offset
        if isinstance(gain, DTensor):
            return gain.redistribute(placements=[Replicate()] * gain.device_mesh.ndim)
        return gain


def preceding_norms(model: PreTrainedModel, blocks: Sequence[Block]) -> dict[str, Norm | None]:
    """By the places of ``blocks``, the norm whose very output each of them is given; None where none is.

    None for a block that gets the residual stream as it is, as in post-norm models such as OLMo 2.

    Raises:
        PatchError: a forward of ``model`` without weights does not reach a block.

    """
    rehearsal = Rehearsal(model)
    outputs: dict[int, list[tuple[str, int]]] = {}  # by memory: modules, and the version that they gave
    alive: list[Tensor] = []  # so that no memory is used twice
    makers: dict[str, list[str]] = {}

    def made(name: str, _: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            outputs.setdefault(output.untyped_storage()._cdata, []).append((name, output._version))

    def given(block: str, x: Tensor, _: Tensor | None) -> None:
        # A view of an output is that output; what was changed in place is not.
        same = outputs.get(x.untyped_storage()._cdata, [])
        makers.setdefault(block, [name for name, version in same if version == x._version])

    modules = dict(rehearsal.model.named_modules())
    for name, module in modules.items():
        module.register_forward_hook(partial(made, name))
    for block in blocks:
        rehearsal.block(block.place).watch("x", partial(given, block.place))
    rehearsal.run()
    rehearsal.require(makers, [block.place for block in blocks], "the norm before the block")

    ours = {place(name): module for name, module in in_use(model)}
    known: dict[str, Norm | None] = {}
    for block in blocks:
        for name in makers[block.place]:
            if name not in known:
                offset = norm_offset(modules[name], block.hidden_size)
                known[name] = None if offset is None else Norm(name, ours[name], offset)
    found = {block.place: [one for name in makers[block.place] if (one := known[name])] for block in blocks}
    return {at: norms[0] if norms else None for at, norms in found.items()}


def norm_offset(module: nn.Module, size: int) -> float | None:
    """What is added to the weight of ``module`` if it is a norm over ``size``: 0, or 1; 1 without a weight.

    None if it is none: if its output is not ``(offset + weight) * n + bias``, where n has a root mean square
    of 1 and does not depend on the size of the input. Its parameters are replaced, so it has to be a copy.
    """
    own = module._parameters
    if module._modules or module._buffers or not own.keys() <= {"weight", "bias"}:
        return None
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, size, generator=generator) for n in (4, 1, 1))

    def run(x: Tensor, weight: Tensor | float, bias: Tensor | float = 0.0) -> Tensor:
        for name, value in (("weight", weight), ("bias", bias)):
            if own.get(name) is not None:
                own[name] = nn.Parameter((torch.zeros(size) + value).flatten(), requires_grad=False)
        return cast(Tensor, module.forward(x))

    def same(one: Tensor, other: Tensor | float) -> bool:
        return torch.allclose(one, torch.zeros_like(one) + other, atol=_TOLERANCE, rtol=_TOLERANCE)

    try:
        at_0, at_1, larger, full = run(x, 0.0), run(x, 1.0), run(3 * x, 1.0), run(x, weight, bias)
    except Exception:  # it takes something else
        return None
    if own.get("weight") is None:
        offset, n = 1.0, at_0
    else:
        n = at_1 - at_0
        offset = 1.0 if same(at_0, n) else 0.0
        if not same(at_0, offset * n):
            return None
    if not same(n.square().mean(-1), 1.0) or not same(larger, at_1):
        return None
    gain = offset if own.get("weight") is None else offset + weight
    return offset if same(full, gain * n + (0.0 if own.get("bias") is None else bias)) else None
