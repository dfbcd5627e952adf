"""What a backend is given: the weights of one MLP, gated or plain."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from triton_ops.certificate import Certificate

Scales: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of ``first``, ``up`` and ``down`` where these are int8: float32 ``[F]``, ``[F]`` and ``[D]``."""


class Int8Weight(NamedTuple):
    """The weight of a linear layer as int8: row d of it is ``rows[d] * scale[d]``."""

    rows: Tensor
    """int8 ``[D, F]``."""
    scale: Tensor
    """float32 ``[D]``."""


class MLP(NamedTuple):
    """One MLP block; T tokens, D hidden size, F neurons.

    ``first`` is the *deciding* projection: the gate of a gated MLP, or the up projection of a plain one,
    whose ``up`` is None and whose h is ``act(first(x))``.
    """

    first: Tensor
    """``[F, D]``."""
    up: Tensor | None
    """``[F, D]``, None in a plain MLP."""
    down: Tensor
    """``[D, F]``, neuron-major (:func:`triton_ops.neuron_major_`)."""
    first_bias: Tensor | None
    """``[F]``."""
    up_bias: Tensor | None
    """``[F]``."""
    down_bias: Tensor | None
    """``[D]``."""
    activation: str
    """A name in :data:`triton_ops.activations.TABLE`."""
    threshold: float | Tensor
    """The parameter of the activation: for all neurons, or ``[F]``."""
    certificate: Certificate | None = None
    """Of ``first``; backends use it for one token."""
