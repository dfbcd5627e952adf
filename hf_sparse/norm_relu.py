"""ReLU after the norms of a layer, so that the inputs of its projections are sparse, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hf_sparse.adapters.bottleneck import by_layer, layer_of
from hf_sparse.adapters.copies import copies
from hf_sparse.adapters.probe_norms import UnclearError, feeding_norms
from hf_sparse.adapters.walk import modules_of
from hf_sparse.checks import known, mapping, shown
from hf_sparse.errors import PatchError
from hf_sparse.parts import Part

if TYPE_CHECKING:
    from hf_sparse.adapters import Block


@dataclass(frozen=True)
class NormReLUConfig(Part):
    """``norm_relu``: a ReLU on the output of each norm that feeds projections in the layers that are patched.

    These are the norms before attention (or a mixer) and before the MLP: stage 2 of ReLU Strikes Back (arXiv
    2310.04564), whose stage 1 is the activation ``"relu"``. Norms of queries and keys, those after attention
    or MLP, and the one before the language modelling head stay as they are. Models that normalise only the
    sums of the residual (BERT, OLMo 2) have no such norm, and are refused.

    The norms stay the modules that they are, with a forward hook. No kernel here reads less for it.
    """

    stays: ClassVar[bool] = True

    @classmethod
    def read(cls, value: Any) -> NormReLUConfig:
        if value is True or isinstance(value, cls):
            return cls()
        if not isinstance(value, Mapping):
            raise ValueError(f"norm_relu={shown(value)} is not known: true is all that it can be.")
        known("norm_relu", mapping("norm_relu", value), [])
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {}

    def outside(
        self, model: nn.Module, chosen: Sequence[Block], blocks: Sequence[Block]
    ) -> list[Callable[[], None]]:
        return [partial(_attach, norm) for norm in _norms(model, chosen, blocks)]

    @classmethod
    def undoing(cls, model: nn.Module, blocks: Sequence[Block]) -> list[Callable[[], None]]:
        return [partial(_detach, module) for module in _with_hook(model, blocks)]

    def confirm(self, model: nn.Module, chosen: Sequence[Block], blocks: Sequence[Block]) -> None:
        wanted = {id(norm) for norm in _norms(model, chosen, blocks)}
        found = {id(module) for module in _with_hook(model, blocks)}
        if found != wanted:
            raise PatchError(
                f"the config says norm_relu, a ReLU after {len(wanted)} norms, and {len(found & wanted)} of "
                f"them and {len(found - wanted)} other modules have one; patch the model again."
            )


def rectified(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """The forward hook of a norm."""
    return torch.relu(output)


def _norms(model: nn.Module, chosen: Sequence[Block], blocks: Sequence[Block]) -> list[nn.Module]:
    """The norms that feed projections in the layers of ``chosen``, all copies of each."""
    names = {block.name for block in chosen}
    found: list[nn.Module] = []
    for name, own in by_layer(blocks).items():
        if not names & {block.name for block in own}:
            continue
        if left := [block.name for block in own if block.name not in names]:
            raise PatchError(
                f"norm_relu is for whole layers, and of the MLP blocks in {name} one, {left[0]}, is not to "
                "be patched; patch it, too."
            )
        try:
            norms = feeding_norms(model.get_submodule(name), own, name)
        except UnclearError as error:
            raise PatchError(
                f"norm_relu needs norms that feed attention and MLP and nothing else, but {error}; leave "
                "norm_relu out."
            ) from error
        places = [place for norm in norms for place in copies(norm.owner, norm.name)]
        found += [cast(nn.Module, owner._modules[norm]) for owner, norm in places]
    return found


def _with_hook(model: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    if all(rectified not in module._forward_hooks.values() for module in modules_of(model)):
        return
    for name in dict.fromkeys(layer_of(block.name) for block in blocks):
        for module in modules_of(model.get_submodule(name)):
            if rectified in module._forward_hooks.values():
                yield module


def _attach(norm: nn.Module) -> None:
    if rectified not in norm._forward_hooks.values():
        norm.register_forward_hook(rectified)


def _detach(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if hook is rectified:
            del module._forward_hooks[key]
