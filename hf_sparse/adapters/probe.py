"""Does a module compute what its structure suggests? Ask it, on a tiny copy.

Names and shapes do not tell a gate from an up projection, nor show a clamp or a norm between them. So the
forward of the module's class runs on a stand-in whose linear layers are 3 x 5 matrices and whose activation
is a marker, and the result is compared with the formula: for small and very large inputs, one token and
several, one sequence and several, in two dtypes. What passes may be replaced; what does not is left alone.
Takes about a millisecond and touches nothing of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_sparse.adapters.roles import LayerRoles, linear_size, shape
from hf_sparse.adapters.terms import Asked, Child, Term, text

_HIDDEN, _INTERMEDIATE = 3, 5
_PLAIN = (bool, int, float, str, type(None))
_CASES = (((1, 4), torch.float64), ((2, 1), torch.float64), ((3, 2), torch.float32))


class _TinyLinear:
    """A linear layer outside of nn.Module, so that no init context (meta, ZeRO-3) can touch it."""

    def __init__(self, fan_in: int, fan_out: int, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.weight = noise(fan_out, fan_in, dtype=dtype, generator=generator)
        self.bias = noise(fan_out, dtype=dtype, generator=generator)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class _StandIn(nn.Module):
    """Knows which of its attributes a forward has read."""

    def __getattribute__(self, name: str) -> Any:
        own: dict[str, Any] = object.__getattribute__(self, "__dict__")
        if "read" in own:
            own["read"].add(name)
        return super().__getattribute__(name)


class _SequentialStandIn(_StandIn, nn.Sequential):
    """Of an ``nn.Sequential``, whose forward needs the class."""


def noise(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values; under ``zero.Init`` torch makes another dtype of what it is asked for."""
    made = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)
    return made.to("cpu", dtype)


def marker(p: Tensor) -> Tensor:
    """A function that no model has for its activation."""
    # Nonlinear and neither odd nor even: no other placement of it gives the same output. And as exact for
    # large p as for small ones: a cosine of p itself would make rounding of a large p into another value.
    return p * torch.sigmoid(1.7 * p) + 0.3 * p.asinh().cos()


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[tokens, D]``; of several tokens the last two are large and opposite, so that every limit shows."""
    x = torch.linspace(-2, 2, tokens * _HIDDEN, dtype=torch.float64, device="cpu").reshape(tokens, _HIDDEN)
    if tokens > 3:
        x[-1] *= 1e11 if dtype == torch.float64 else 1e6
        x[-2] = -x[-1]
    return x.to(dtype)


def kind(module: nn.Module) -> tuple[type[nn.Module], Any, tuple[int, int] | None]:
    """Equal for modules that are alike as children of what is probed, where they do not run themselves.

    Class, its forward, and the size of a linear layer.
    """
    return type(module), type(module).forward, linear_size(module)


def likeness(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules whose own attributes and tensors look alike to a probe; while these exist."""
    settings = [
        (k, v if type(v) in _PLAIN else id(v)) for k, v in vars(module).items() if k not in _OF_ANY_MODULE
    ]
    tensors = (*module._parameters.items(), *module._buffers.items())
    sizes = [(k, None if v is None else shape(v)) for k, v in tensors]
    return *kind(module), tuple(settings), tuple(sizes)


def has_more(module: nn.Module, names: Collection[str]) -> bool:
    """Whether ``module`` has buffers, or other children than ``names`` that may do something in eval mode."""
    others = [child for name, child in module._modules.items() if name not in names]
    return any(v is not None for v in module._buffers.values()) or any(
        type(child) not in (nn.Dropout, nn.Identity, type(None)) for child in others
    )


def own_values(module: nn.Module) -> dict[str, Any]:
    """The attributes of ``module`` for a stand-in, which can change none of them."""
    kinds = (list, dict, set)
    return {k: v.copy() if type(v) in kinds else v for k, v in vars(module).items()}


def computes(module: nn.Module, roles: LayerRoles, *, training: bool = False) -> bool:
    """Whether ``type(module).forward`` in eval mode is the formula of ``roles`` (see :class:`LayerRoles`).

    And nothing else: a forward that has a use for a setting, a parameter or a buffer of the module itself may
    compute it today and something else when that has changed. A dropout rate is of no use in eval mode.

    Or in ``training``, where children that are dropouts count as if they did nothing.
    """
    if has_more(module, roles.names) or any(v is not None for v in module._parameters.values()):
        return False
    spelled = _spells(module, roles, training=training)
    if spelled is not None:
        return spelled
    return all(_agrees(module, roles, leading, dtype, training=training) for leading, dtype in _CASES)


def _spells(module: nn.Module, roles: LayerRoles, *, training: bool) -> bool | None:
    """The answer of :func:`computes`, if the forward has no need of numbers; else None."""
    if roles.written is not None:
        return None
    asked = Asked()
    parts = {name: Child(name, asked) for name in roles.names}
    values = {**own_values(module), "training": training}
    read: set[str] = set()
    x = Term("x", asked)
    try:
        wanted = parts[roles.down](roles.hidden(parts.__getitem__, x))  # type: ignore[arg-type]
        with torch.no_grad():
            out = type(module).forward(_stand_in(module, {**values, "read": read}, parts), x)
    except Exception:  # it needs more than terms have
        return None
    if asked.anything or type(out) is not Term or not values.keys().isdisjoint(read - _OF_ANY_MODULE):
        return None
    return text(out) == text(wanted)


def _agrees(
    module: nn.Module, roles: LayerRoles, leading: tuple[int, int], dtype: torch.dtype, *, training: bool
) -> bool:
    sizes = roles.linears(_HIDDEN, _INTERMEDIATE)
    act = marker if roles.written is None else ACT2FN[roles.written]
    parts: dict[str, Callable[[Tensor], Tensor]] = {roles.act: act}
    parts.update((name, _TinyLinear(*size, seed, dtype)) for seed, (name, size) in enumerate(sizes.items()))
    x = inputs(leading[0] * leading[1], dtype).reshape(*leading, _HIDDEN)
    wanted = parts[roles.down](roles.hidden(parts.__getitem__, x))
    values = {**own_values(module), "training": training}
    read: set[str] = set()
    out = _run(module, {**values, "read": read}, parts, x)
    if out is None or out.shape != x.shape or out.dtype != dtype:
        return False
    for name in read - _OF_ANY_MODULE:
        value = values.get(name)
        if isinstance(value, list | dict | set | Tensor):
            return False  # a record, which it may keep
        if isinstance(value, int | float):
            other = not value if isinstance(value, bool) else value + type(value)(1) / 2
            changed = _run(module, {**values, name: other}, parts, x)
            if changed is None or not torch.equal(changed, out):
                return False
    if roles.written is not None and dtype == torch.float32:
        return torch.equal(out, wanted)  # other words for a function have other bits
    return torch.allclose(out, wanted, rtol=1e-9 if dtype == torch.float64 else 1e-4)


def _run(
    module: nn.Module, values: dict[str, Any], parts: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor
) -> Tensor | None:
    """What the forward of the class makes of ``x`` with other attributes and children; None if it cannot."""
    given = x.clone()
    try:
        with torch.no_grad():
            out = type(module).forward(_stand_in(module, values, parts), given)
    except Exception:  # a forward with other arguments or inner sizes: simply not this formula
        return None
    return out if isinstance(out, Tensor) and torch.equal(given, x) else None


def _stand_in(module: nn.Module, values: dict[str, Any], parts: Mapping[str, Any]) -> Any:
    # No instance of the class: a forward that needs more of it than the children and attributes that a
    # sparse block takes over (other methods, super()) must not pass.
    stand_in = object.__new__(_SequentialStandIn if type(module) is nn.Sequential else _StandIn)
    stand_in.__dict__.update(values)
    stand_in.__dict__["_modules"] = {
        name: parts.get(name, nn.Identity() if isinstance(child, nn.Dropout) else child)
        for name, child in module._modules.items()
    }
    return stand_in


_OF_ANY_MODULE = vars(nn.Module()).keys()
