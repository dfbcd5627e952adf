"""Gaussian noise on the weights of the MLP blocks, drawn anew for each token, while they are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_sparse.adapters import Block
from hf_sparse.adapters.kept import Kept
from hf_sparse.adapters.roles import LayerRoles, linear_size
from hf_sparse.errors import PatchError
from hf_sparse.fields import require
from hf_sparse.methods.constrained import patched_blocks
from hf_sparse.methods.method import Acting, Method, Training

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class WeightNoise(Method):
    """Tokenwise weight noise (MagicSynapse in the code released with arXiv 2309.03004 and 2605.25612).

    In training mode each linear layer of the patched blocks gives ``W x + b + eps * sigma * |x|``, with
    ``eps ~ N(0, I)`` for each token, ``|x|`` the Euclidean norm and ``sigma = rho * |W| / sqrt(numel W)``,
    rho times the root mean square of the weights. That is ``(W + E) x + b`` with ``E ~ N(0, sigma^2)`` for
    each token; the noise carries no gradient. Under LoRA, W is the base weight.
    """

    name = "weight_noise"

    rho: float = 0.1
    """Noise over weight, as standard deviations (published: 0.1, and 0.05)."""

    linears: Literal["all", "first"] = "all"
    """All linear layers of a block, as the released ViT has it, or those before the activation, as its T5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rho >= 0, "methods.weight_noise.rho", self.rho, "it must be at least 0")

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.weight_noise is for patched blocks, and patch=none patches none; leave it out, or "
                "patch with activation: original."
            )

    def attach(self, training: Training) -> Acting:
        found = [linear for block in patched_blocks(training.model) for linear in self._linears(block)]
        return _Acting(found, self.rho)

    def _linears(self, block: Block) -> list[nn.Module]:
        roles = block.roles
        if isinstance(roles, LayerRoles):
            first = roles.before_down
        elif isinstance(roles, Kept):
            first = roles.first
        else:
            raise PatchError(
                f"methods.weight_noise needs linear layers, but the weights of {block.name} are stacked "
                "experts; leave the method out, or these blocks unpatched (layers=)."
            )
        names = (*first, roles.down) if self.linears == "all" else first
        linears = [block.module.get_submodule(name) for name in names]
        for name, linear in zip(names, linears, strict=True):
            if not _weight(linear).is_floating_point():
                raise ValueError(
                    f"methods.weight_noise cannot tell the size of the weight of {block.name}.{name}, which "
                    "is quantised; load the model in a floating-point dtype."
                )
        return linears


class _Acting(Acting):
    def __init__(self, linears: Sequence[nn.Module], rho: float) -> None:
        self._rho = rho
        self._handles = [linear.register_forward_hook(self._add) for linear in linears if rho > 0]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not linear.training:
            return None
        with torch.no_grad():
            size = torch.linalg.vector_norm(args[0], dim=-1, keepdim=True, dtype=torch.float32)
            noise = torch.randn_like(output) * (self._sigma(linear) * size).to(output.dtype)
        return output + noise

    def _sigma(self, linear: nn.Module) -> Tensor:
        weight, declared = _weight(linear), linear_size(linear)
        assert declared is not None
        if weight.numel() != math.prod(declared):
            raise RuntimeError(
                f"methods.weight_noise finds {weight.numel()} of {math.prod(declared)} weights of a linear "
                "layer after its forward: ZeRO-3 and FSDP1 have taken them away; train with FSDP2 or data "
                "parallelism."
            )
        return self._rho * torch.linalg.vector_norm(weight, dtype=torch.float32) / math.sqrt(weight.numel())


def _weight(linear: Any) -> Tensor:
    base = getattr(linear, "get_base_layer", None)  # under LoRA
    weight: Tensor = (base() if callable(base) else linear).weight
    return weight
