"""What is chosen for, measured and remembered: an operator at one size, in one dtype, on one device."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Form = Literal["gated", "plain", "linear", "dense_linear"]
"""The operator: :func:`triton_ops.gated_mlp`, ``plain_mlp``, ``sparse_linear`` or ``linear``."""

MATRICES: dict[Form, int] = {"gated": 3, "plain": 2, "linear": 1, "dense_linear": 1}
"""How many weight matrices each form has."""


class Problem(NamedTuple):
    """The key of every choice and measurement."""

    form: Form
    hidden: int
    """D."""
    neurons: int
    """F."""
    dtype: torch.dtype
    """Of weights and activations."""
    device: str
    """Its type: ``"cpu"``, ``"cuda"``."""
    certified: bool = False
    """With a certificate, which is of use for one token."""

    @property
    def down_bytes(self) -> int:
        """Size of the down projection."""
        return self.hidden * self.neurons * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Size of all its weights."""
        return MATRICES[self.form] * self.down_bytes
