"""The gains of the norms before the MLP blocks become at least 1, and the model computes what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers.pytorch_utils import Conv1D

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import by_layer
from hf_sparse.adapters.copies import active
from hf_sparse.adapters.kept import Kept
from hf_sparse.adapters.probe_norms import Feed, UnclearError, feeding_norms
from hf_sparse.adapters.roles import LayerRoles, input_pruning
from hf_sparse.errors import PatchError
from hf_sparse.methods.constrained import (
    patched_blocks,
    require_changeable,
    require_patched,
    require_trained,
)
from hf_sparse.methods.method import Acting, Method, Training
from hf_sparse.modules.decoding_linear import is_linear
from hf_sparse.modules.zeroth_bias import NAME as ZEROTH_BIAS
from hf_sparse.modules.zeroth_bias import ZerothBias
from hf_sparse.norms import Norm, preceding_norms
from hf_sparse.patching import transformers_model

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig

_MOST = 60
"""Doublings of one gain: what is below 2^-60 is as good as none."""


@dataclass(frozen=True, kw_only=True)
class NormRescale(Method):
    """What restricted norms demand, without a change of the function; ours, for models with small gains.

    Before the first update each gain ``0 < |w_j| < 1`` of the norm before a patched block is doubled until it
    is at least 1, with the bias of the norm and the zeroth bias beside it, and column j of the projections
    that read it is halved as often. Multiplying by powers of two is exact: where the gain is the weight
    itself the model computes the same bits (where it is 1 + weight, the same to rounding). ``norm_uplift``
    beside it then has only gains of 0 to lift, and holds the others.
    """

    name = "norm_rescale"

    def check(self, sparsity: SparsityConfig | None) -> None:
        require_patched(sparsity, self.name)

    def attach(self, training: Training) -> Acting:
        return _Acting(_found(training.model))


@dataclass(frozen=True)
class _Place:
    """A norm, what reads it, and the zeroth bias in between, if there is one."""

    norm: Norm
    readers: tuple[nn.Module, ...]
    leaf: ZerothBias | None


class _Acting(Acting):
    def __init__(self, places: Sequence[_Place]) -> None:
        self._places = places

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if step != 1:  # a resumed run has done it
            return
        for place in self._places:
            _rescale(place)


def _rescale(place: _Place) -> None:
    norm = place.norm
    weight, gain = norm.weight, norm.whole_gain()
    assert weight is not None
    assert gain is not None
    require_changeable(weight, NormRescale.name)
    gain = gain.to_local() if isinstance(gain, DTensor) else gain
    _, exponent = torch.frexp(gain.float().abs())  # m 2^e with 1/2 <= m < 1: doubled 1 - e times it is 2 m
    doublings = (1 - exponent).clamp(0, _MOST).masked_fill(gain == 0, 0)
    up, down = (torch.ldexp(torch.ones_like(gain), d).to(weight.dtype) for d in (doublings, -doublings))
    weight.copy_((weight + norm.offset) * _like(up, weight) - norm.offset)
    for other in (norm.bias, None if place.leaf is None else place.leaf.bias):
        if other is not None:
            other.mul_(_like(up, other))
    for reader in place.readers:
        own = cast(nn.Parameter, reader.weight)
        require_changeable(own, NormRescale.name)
        own.mul_(_like(down.unsqueeze(-1) if isinstance(reader, Conv1D) else down, own))


def _like(values: Tensor, other: Tensor) -> Tensor:
    """``values``, all of them in every process, for a product with ``other``, which may be sharded."""
    values = values.to(other.device, other.dtype)
    if not isinstance(other, DTensor):
        return values
    mesh = other.device_mesh
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _found(model: nn.Module) -> list[_Place]:
    """Every norm before a patched block, and what reads it.

    Raises:
        PatchError: there is none, it is read by something else as well, or that cannot be told.
        ValueError: a parameter that would be changed is not trained, or cannot be changed.

    """
    base, blocks = transformers_model(model), patched_blocks(model)
    feeds = _feeds(base, blocks)
    places = []
    for at, norm in preceding_norms(base, blocks).items():
        (block,) = (one for one in blocks if one.place == at)
        if norm is None or norm.weight is None:
            what = "no norm stands before it" if norm is None else f"{norm.name} has no weight"
            raise PatchError(f"{_RESCALES}, but at {at} {what}; {_MEND}.")
        children = next(
            (f.children for f in feeds if active(f.owner.get_submodule(f.name)) is norm.module), ()
        )
        own, readers = _readers(block)
        if others := sorted(set(children) - own):
            raise PatchError(
                f"{_RESCALES}, but {others[0]} reads {norm.name}, and what it does with it is not known; "
                f"{_MEND}."
            )
        if not children or not readers:
            raise PatchError(f"{_RESCALES}, but what reads {norm.name} cannot be told; {_MEND}.")
        for name, reader in readers.items():
            if not (is_linear(reader) or type(reader) is Conv1D) or input_pruning(reader) is not None:
                raise PatchError(
                    f"{_RESCALES}, but {name} ({type(reader).__name__}) is no plain linear layer: it is "
                    f"wrapped, quantised, or has thresholds on its inputs; {_MEND}."
                )
            require_trained(cast(nn.Parameter, reader.weight), f"{name}.weight", NormRescale.name)
        require_trained(norm.weight, norm.name, NormRescale.name)
        leaf = block.module._modules.get(ZEROTH_BIAS)
        shift = None if leaf is None else active(leaf)
        if not isinstance(shift, ZerothBias) or shift.placement != "input":
            shift = None
        places.append(_Place(norm, tuple(readers.values()), shift))
    return places


_RESCALES = "methods.norm_rescale rescales the norm before each patched MLP block and what reads it"
_MEND = "leave the method out, or such blocks unpatched (layers=)"


def _feeds(base: nn.Module, blocks: Sequence[Block]) -> list[Feed]:
    layers = by_layer(blocks).items()
    try:
        return [feed for n, own in layers for feed in feeding_norms(base.get_submodule(n), own, n)]
    except UnclearError as error:
        raise PatchError(f"{_RESCALES}, but {error}; {_MEND}.") from error


def _readers(block: Block) -> tuple[set[str], dict[str, nn.Module]]:
    """What a norm may feed that is of ``block``, and the linear layers that read its input, by name."""
    roles = block.roles
    if isinstance(roles, Kept):
        readers = {f"{block.name}.{name}": block.module.get_submodule(name) for name in roles.first}
        return set(readers), readers
    if isinstance(roles, LayerRoles):
        names = roles.before_down
        return {block.name}, {f"{block.name}.{name}": block.module.get_submodule(name) for name in names}
    return {block.name}, {}
