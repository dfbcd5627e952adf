"""What a backend is: the functions that compute, and what can be said of them without running them.

``docs/extending.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from triton_ops.certificate import Certificate
from triton_ops.mlp import MLP, Int8Weight, Scales
from triton_ops.pairs import PairProducts


@dataclass(frozen=True, kw_only=True)
class Default:
    """What holds for a backend and a dtype without a measurement on this machine."""

    min_bytes: int
    """Size of the weights of a block below which the call of the operator costs more than skipping saves."""

    few: int
    """Number of tokens up to which a call is no slower than dense at any density, for all four operators."""

    linear_min_bytes: int | None = None
    """Size of a weight below which ``linear`` is slower than torch's; None: it is not chosen unmeasured."""

    beyond: float = 0.0
    """Break-even density for more tokens than those, on a machine where the backend multiplies."""

    certified: tuple[float, ...] = ()
    """Density up to which a certificate makes an MLP faster still, for 1 token; none: no use for one."""

    must_multiply: bool = False
    """Whether all this was measured, and holds, only on machines where the backend multiplies."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to skip silent neurons. Importing its registration must be cheap, and possible everywhere."""

    name: str
    """As users write it."""

    devices: tuple[str, ...]
    """Types of devices on which it is chosen without being asked for."""

    dtypes: tuple[torch.dtype, ...]
    """Those that it has kernels for."""

    unusable: Callable[[str], str | None]
    """Of a type of device: why it cannot run there, None if it can. It may build what it needs first."""

    mlp: Callable[[Tensor, MLP], Tensor]
    """The block for ``x [..., D]``, at least one token: ``[..., D]``, contiguous. The tensors fit together,
    ``down`` is neuron-major, other strides are any; the certificate may be left unused."""

    sparse_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """``h [..., F]``, at least one token, ``weight [D, F]`` neuron-major, bias ``[D]``: ``[..., D]``."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    """The dense product: ``x [..., F]``, at least one token, ``weight [D, F]``, neither D nor F being 0, bias
    ``[D]``, all of any strides: ``[..., D]``, contiguous. None: torch's is the only one."""

    greedy_linear: Callable[[Tensor, Tensor, Tensor | None, Certificate], Tensor] | None = None
    """``linear``, for a weight on the CPU whose rows are contiguous, of which only what may be the largest
    output of a token is computed, with the bits of ``linear``; others are -infinity."""

    certify: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """Of a weight ``[D, F]`` whose rows are contiguous, on the CPU: writes the rows and the bounds of its
    certificate. None: torch makes them, which takes many times as long."""

    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor] | None = None
    """:func:`triton_ops.decode_attention` of tensors on the CPU, of this dtype, that fit together, are not
    empty and whose rows are contiguous."""

    int8_mlp: Callable[[Tensor, MLP, Scales], Tensor] | None = None
    """``mlp`` with weights that are int8, for up to :data:`triton_ops.int8.INT8_TOKENS` tokens on the CPU;
    without a certificate. None: there is no kernel."""

    int8_linear: Callable[[Tensor, Int8Weight, Tensor | None], Tensor] | None = None
    """``linear`` with such a weight; there is one if there is ``int8_mlp``."""

    int8_sparse_linear: Callable[[Tensor, Int8Weight, Tensor | None], Tensor] | None = None
    """And ``sparse_linear``."""

    pairs: PairProducts | None = None
    """What :func:`triton_ops.trained_mlp` needs. None: it trains dense there."""

    native: Callable[[], bool] = lambda: False
    """Whether operators of graphs on the CPU have an overload ``native`` that calls it without Python in
    between, and may be called wherever this backend is chosen. It may build it."""

    certifies: bool = False
    """Whether it makes use of a certificate."""

    multiplies: Callable[[torch.dtype], bool] = lambda dtype: False
    """Of a dtype: whether, on this machine, ``sparse_linear`` is no slower than torch with a neuron-major
    weight even if no neuron is silent, for any number of tokens."""

    defaults: Mapping[torch.dtype, Default] = field(default_factory=dict)
    """What holds without a measurement; it is not chosen before one where there is none."""

    def obstacle(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run on this type of device in this dtype; None if it can."""
        if dtype not in self.dtypes:
            return f"it has no kernel for {dtype}; use {' or '.join(map(str, self.dtypes))}"
        return self.unusable(device)

    def default(self, dtype: torch.dtype) -> Default | None:
        """What holds on this machine without a measurement, if anything does."""
        found = self.defaults.get(dtype)
        return None if found and found.must_multiply and not self.multiplies(dtype) else found
