"""One row per activation: what everything else that names an activation is made from.

Checks, autograd, the reference, the numbers that the kernels know activations by, and the names that
``hf_sparse`` accepts all read :data:`TABLE`. The compiled kernels have one formula of each row,
``cpu/activation.h`` and ``gpu/numerics.py``; they find their place here by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """What an activation may have: one number, or one for each neuron. It counts in the dtype of ``p``."""

    name: str
    """What users call it; the operators call every parameter ``threshold``."""
    least: float = -math.inf
    """The smallest value that it may have."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A pointwise function that is exactly 0 for most neurons of a sparse model.

    Its functions take pre-activations ``p``, ``[..., F]`` of a floating dtype, and the parameter, in units of
    ``p`` (of the value for ``cats_…``): a number, or a tensor ``[F]`` of that dtype; 0 for a row that has
    none. NaN is never silent: it comes through.
    """

    name: str
    code: int = -1
    """Its place in :data:`TABLE`, which is what compiled kernels are given."""
    value: Callable[[Tensor, float | Tensor], Tensor]
    """The activation, in the torch calls of its module, so that both have the same bits."""
    slope: Callable[[Tensor, float | Tensor], Tensor]
    """The derivative of ``value``, what autograd computes: at the kink it is 0."""
    silent: Callable[[Tensor, float | Tensor], Tensor]
    """Where ``value`` is 0 and a kernel need not look further, as bool."""
    parameter: Parameter | None = None
    relu_up: bool = False
    """Whether the up projection goes through ReLU as well; such an activation needs a gate."""
    certifiable: bool = True
    """Whether ``p`` being silent makes everything below it silent. Then an upper bound of ``p`` proves
    silence (:mod:`triton_ops.certificate`); without it a certificate is not used."""


def _jsrelu(p: Tensor) -> Tensor:
    r = torch.relu(p)
    return r + 0.5 * r.square()


def _jsrelu_linear(p: Tensor) -> Tensor:
    d = torch.relu(p - 4)
    return _jsrelu(p.clamp(max=4)) + (4 * d + d)  # not 5 * d, which a compiler may round once less


def _cats(name: str, own: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Activation:
    """CATS (arXiv 2404.08763): of the model's ``own`` activation only what is not small is kept.

    Not certifiable: both functions fall before they rise, so that a neuron below a silent one may be active.
    """

    def silent(a: Tensor, t: float | Tensor) -> Tensor:
        return a.abs() < t

    def value(p: Tensor, t: float | Tensor) -> Tensor:
        a = own(p)
        return a.masked_fill(silent(a, t), 0)

    return Activation(
        name=name,
        value=value,
        slope=lambda p, t: slope(p).masked_fill(silent(own(p), t), 0),
        silent=lambda p, t: silent(own(p), t),
        parameter=Parameter("threshold", least=0.0),
        certifiable=False,
    )


def _gelu_slope(p: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(p), p, approximate=approximate)


_ROWS = (
    Activation(
        name="relu",
        value=lambda p, _: torch.relu(p),
        slope=lambda p, _: (p > 0).to(p.dtype),
        silent=lambda p, _: p <= 0,
    ),
    Activation(  # Primer (arXiv 2109.08668); ReLU² Wins (arXiv 2402.03804)
        name="relu2",
        value=lambda p, _: torch.relu(p).square(),
        slope=lambda p, _: 2 * torch.relu(p),
        silent=lambda p, _: p <= 0,
    ),
    Activation(  # ReLU Strikes Back (arXiv 2310.04564)
        name="shifted_relu",
        value=lambda p, t: torch.relu(p - t),
        slope=lambda p, t: (p - t > 0).to(p.dtype),
        silent=lambda p, t: p <= t,
        parameter=Parameter("shift"),
    ),
    Activation(  # ProSparse (arXiv 2402.13516)
        name="fatrelu",
        value=lambda p, t: p.masked_fill(p < t, 0),
        slope=lambda p, t: torch.ones_like(p).masked_fill(p < t, 0),
        silent=lambda p, t: p < t,
        parameter=Parameter("threshold", least=0.0),
    ),
    Activation(  # TurboSparse (arXiv 2406.05955)
        name="drelu",
        value=lambda p, _: torch.relu(p),
        slope=lambda p, _: (p > 0).to(p.dtype),
        silent=lambda p, _: p <= 0,
        relu_up=True,
    ),
    Activation(  # J-SquaredReLU (arXiv 2605.25612)
        name="jsrelu",
        value=lambda p, _: _jsrelu(p),
        slope=lambda p, _: (p > 0).to(p.dtype) + torch.relu(p),
        silent=lambda p, _: p <= 0,
    ),
    Activation(  # the same, numerically controlled: its tangent beyond 4 (code of arXiv 2605.25612)
        name="jsrelu_linear",
        value=lambda p, _: _jsrelu_linear(p),
        slope=lambda p, _: (p > 0).to(p.dtype) + torch.relu(p).clamp(max=4),
        silent=lambda p, _: p <= 0,
    ),
    _cats("cats_silu", F.silu, lambda p: torch.ops.aten.silu_backward(torch.ones_like(p), p)),
    _cats("cats_gelu", F.gelu, lambda p: _gelu_slope(p, "none")),
    _cats("cats_gelu_tanh", lambda p: F.gelu(p, approximate="tanh"), lambda p: _gelu_slope(p, "tanh")),
)

TABLE: dict[str, Activation] = {row.name: replace(row, code=code) for code, row in enumerate(_ROWS)}
"""Every activation that the operators know, by name."""

ACTIVATIONS = tuple(TABLE)
"""The names."""


def check(name: str, threshold: float | Tensor, *, gated: bool) -> None:
    """Raise ValueError if ``name`` is unknown or needs a gate, or ``threshold`` is out of its range.

    The values of a tensor are not looked at, which on a GPU would mean to wait for it.
    """
    row = TABLE.get(name)
    if row is None:
        raise ValueError(f"activation={name!r} is not known; choose one of {', '.join(TABLE)}.")
    if row.relu_up and not gated:
        raise ValueError(f"activation={name!r} needs a gate and an up projection; use 'relu' in a plain MLP.")
    each = isinstance(threshold, Tensor)
    if row.parameter is None:
        if each or threshold != 0:
            given = "tensor" if each else threshold
            known = ", ".join(other.name for other in _ROWS if other.parameter)
            raise ValueError(
                f"threshold={given} has no meaning for activation={name!r}; leave it at 0 or use one of "
                f"{known}."
            )
    elif not each and not threshold >= row.parameter.least:
        least = row.parameter.least
        mend = "a number" if least == -math.inf else f"at least {least:g}"
        raise ValueError(f"threshold={threshold} is not valid for {name}; it is {mend}.")
