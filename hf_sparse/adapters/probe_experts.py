"""Does a module with stacked parameters compute what their shapes suggest? As :mod:`probe`, on a tiny copy.

The forward of the class as it is written runs, not one of those that transformers may put in its place
(``experts_implementation``), which are meant to compute the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_sparse.adapters.experts import Experts, Routed, project, shape
from hf_sparse.adapters.probe import inputs, marker, noise

_HIDDEN, _INTERMEDIATE, _TOKENS = 3, 5, 7


class _Marker(nn.Module):
    """The activation: our own function, or none at all."""

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self.silent = silent

    def forward(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p) if self.silent else marker(p)


class _Norm(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return 0.7 * y + 0.1 * y.sin()


def computes(module: nn.Module, roles: Experts) -> bool:
    """Whether ``type(module).forward`` in eval mode adds up weighted experts, each as ``roles`` says."""
    kept = shape(module._parameters[roles.down])[0]  # type: ignore[arg-type]
    count = min(kept, 3)
    generator = torch.Generator(device="cpu").manual_seed(0)
    stand_in = _stand_in(module, roles, count, generator)
    x = inputs(_TOKENS)
    index = torch.arange(_TOKENS * min(2, count), device="cpu").reshape(_TOKENS, -1) % count
    if roles.identity:
        index[0, 0] = kept
    weights = torch.rand(index.shape, generator=generator, dtype=torch.float64, device="cpu")
    forward = inspect.unwrap(type(module).forward)
    try:
        with torch.no_grad():
            out = forward(stand_in, x, index, weights)
            wanted = _sum(stand_in, roles, Routed(x, index, weights), kept)
            stand_in._modules[roles.act] = _Marker(silent=True)
            silent = roles.inside(stand_in, x, 0).h
    except Exception:  # a forward with other arguments or inner sizes: simply not this formula
        return False
    # Some add up in float32.
    same = isinstance(out, Tensor) and out.shape == x.shape and torch.allclose(out, wanted, rtol=1e-5)
    return same and not silent.any().item()


def _sum(stand_in: nn.Module, roles: Experts, call: Routed, kept: int) -> Tensor:
    out = torch.zeros_like(call.x)
    for expert, tokens, weight in call.by_expert(kept + 1):
        y = call.x[tokens]
        if expert < kept:
            h = roles.inside(stand_in, y, expert).h
            y = project(stand_in, roles.down, h, expert, transposed=roles.transposed)
            if roles.norm is not None:
                y = stand_in._modules[roles.norm](y)  # type: ignore[misc]
        out.index_add_(0, tokens, y * weight)
    return out


def _stand_in(module: nn.Module, roles: Experts, count: int, generator: torch.Generator) -> nn.Module:
    """The module with tiny parameters, a marker for its activation, and nothing of its class."""
    wide = (2 if roles.gated else 1) * _INTERMEDIATE
    sizes: dict[str, tuple[int, ...]] = {roles.first: (wide, _HIDDEN), roles.down: (_HIDDEN, _INTERMEDIATE)}
    tiny: dict[str, Tensor] = {}
    for name, size in sizes.items():
        stacked = (count, *(size[::-1] if roles.transposed else size))
        tiny[name] = noise(*stacked, generator=generator)
        bias = f"{name}_bias"
        if module._parameters.get(bias) is not None:
            tiny[bias] = noise(count, size[0], generator=generator)
    stand_in: Any = object.__new__(nn.Module)
    stand_in.__dict__.update(module.__dict__)
    stand_in.__dict__.update(training=False, _parameters=tiny)
    act = _Marker() if roles.written is None else ACT2FN[roles.written]
    stand_in.__dict__["_modules"] = {**module._modules, roles.act: act}
    if roles.norm is not None:
        stand_in.__dict__["_modules"][roles.norm] = _Norm()
    own: Any = getattr(type(module), "_apply_gate", None)
    if own is not None:
        stand_in.__dict__["_apply_gate"] = lambda both: own(stand_in, both)
    return stand_in
