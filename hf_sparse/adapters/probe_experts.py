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

from hf_sparse.adapters.experts import Experts, Routed, project
from hf_sparse.adapters.probe import has_more, inputs, marker, noise, own_values
from hf_sparse.adapters.roles import shape

_HIDDEN, _INTERMEDIATE = 3, 5
_CASES = ((7, 2, torch.float64), (1, 2, torch.float64), (12, 3, torch.float32))
"""Tokens, experts of each, dtype."""


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
    if has_more(module, roles.names):
        return False
    return all(_agrees(module, roles, tokens, slots, dtype) for tokens, slots, dtype in _CASES)


def _agrees(module: nn.Module, roles: Experts, tokens: int, slots: int, dtype: torch.dtype) -> bool:
    kept = shape(module._parameters[roles.down])[0]  # type: ignore[arg-type]
    count = min(kept, 6)
    generator = torch.Generator(device="cpu").manual_seed(0)
    stand_in = _stand_in(module, roles, count, dtype, generator)
    x = inputs(tokens, dtype)
    # Some token has one expert twice, where there are two slots.
    index = torch.arange(tokens * slots, device="cpu").reshape(slots, tokens).t() * 5 // 3 % count
    index[0] = index[0, 0]
    if roles.identity:
        index[-1, -1] = kept
    weights = noise(*index.shape, dtype=dtype, generator=generator)
    call = Routed(x, index, 1.5 * weights)
    given = Routed(*(one.clone() for one in call))
    forward = inspect.unwrap(type(module).forward)
    try:
        with torch.no_grad():
            out = forward(stand_in, *given)
            wanted = _sum(stand_in, roles, call, kept)
            stand_in._modules[roles.act] = _Marker(silent=True)
            silent = roles.inside(stand_in, x, 0).h
    except Exception:  # a forward with other arguments or inner sizes: simply not this formula
        return False
    same = isinstance(out, Tensor) and out.shape == x.shape and all(map(torch.equal, given, call))
    # Some add up in float32.
    return same and torch.allclose(out, wanted.to(out.dtype), rtol=1e-4) and not silent.any().item()


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


def _stand_in(
    module: nn.Module, roles: Experts, count: int, dtype: torch.dtype, generator: torch.Generator
) -> nn.Module:
    """The module with tiny parameters, a marker for its activation, and nothing of its class."""
    wide = (2 if roles.gated else 1) * _INTERMEDIATE
    sizes: dict[str, tuple[int, ...]] = {roles.first: (wide, _HIDDEN), roles.down: (_HIDDEN, _INTERMEDIATE)}
    tiny: dict[str, Tensor] = {}
    for name, size in sizes.items():
        stacked = (count, *(size[::-1] if roles.transposed else size))
        tiny[name] = noise(*stacked, dtype=dtype, generator=generator)
        bias = f"{name}_bias"
        if module._parameters.get(bias) is not None:
            tiny[bias] = noise(count, size[0], dtype=dtype, generator=generator)
    stand_in: Any = object.__new__(nn.Module)
    stand_in.__dict__.update(own_values(module))
    stand_in.__dict__.update(training=False, _parameters=tiny)
    act = _Marker() if roles.written is None else ACT2FN[roles.written]
    stand_in.__dict__["_modules"] = {**module._modules, roles.act: act}
    if roles.norm is not None:
        stand_in.__dict__["_modules"][roles.norm] = _Norm()
    own: Any = getattr(type(module), "_apply_gate", None)
    if own is not None:
        stand_in.__dict__["_apply_gate"] = lambda both: own(stand_in, both)
    return stand_in
