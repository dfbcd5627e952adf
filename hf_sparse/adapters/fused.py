"""A gated MLP whose gate and up projections are one linear layer: Phi-3, GLM, ModernBERT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

from torch import Tensor

from hf_sparse.adapters.roles import Child, LayerRoles, Linear


@dataclass(frozen=True, kw_only=True)
class Fused(LayerRoles):
    """Two linear layers, the first twice as wide."""

    gate_up: str
    """The linear layer ``[2F, D]``: one half is the gate, the other the up projection."""
    gate_first: bool

    formula = "down(act(gate(x)) * up(x)) with gate and up in one layer"

    @classmethod
    def assignments(cls, names: Sequence[str], act: str) -> Iterator[Fused]:
        for (gate_up, down), gate_first in product(permutations(names, 2), (True, False)):
            yield cls(gate_up=gate_up, gate_first=gate_first, down=down, act=act)

    @property
    def form(self) -> Literal["gated"]:
        return "gated"

    @property
    def before_down(self) -> tuple[str, ...]:
        return (self.gate_up,)

    @property
    def deciding(self) -> None:
        return None

    def linears(self, hidden: int, neurons: int) -> dict[str, tuple[int, int]]:
        return {self.gate_up: (hidden, 2 * neurons), self.down: (neurons, hidden)}

    def project(self, child: Child, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = child(self.gate_up)(x).chunk(2, dim=-1)
        return (first, second) if self.gate_first else (second, first)

    def split(self, read: Sequence[Linear]) -> Sequence[Linear]:
        ((weight, bias),) = read
        halves = list(zip(weight.chunk(2), (None, None) if bias is None else bias.chunk(2), strict=True))
        return halves if self.gate_first else halves[::-1]
