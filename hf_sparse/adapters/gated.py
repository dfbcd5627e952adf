"""``down(act(gate(x)) * up(x))``, each projection a linear layer: Llama, Qwen, Gemma and most others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from torch import Tensor

from hf_sparse.adapters.roles import Child, LayerRoles


@dataclass(frozen=True, kw_only=True)
class Gated(LayerRoles):
    """Three linear layers."""

    gate: str
    up: str

    formula = "down(act(gate(x)) * up(x))"

    @classmethod
    def assignments(cls, names: Sequence[str], act: str) -> Iterator[Gated]:
        for gate, up, down in permutations(names, 3):
            yield cls(gate=gate, up=up, down=down, act=act)

    @property
    def form(self) -> Literal["gated"]:
        return "gated"

    @property
    def before_down(self) -> tuple[str, ...]:
        return self.gate, self.up

    @property
    def factor(self) -> str:
        return self.up

    def linears(self, hidden: int, neurons: int) -> dict[str, tuple[int, int]]:
        return {self.gate: (hidden, neurons), self.up: (hidden, neurons), self.down: (neurons, hidden)}

    def project(self, child: Child, x: Tensor) -> tuple[Tensor, Tensor]:
        return child(self.gate)(x), child(self.up)(x)
