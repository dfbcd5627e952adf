"""``down(act(up(x)))``: GPT-2 and GPT-NeoX, Phi, Nemotron, Starcoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from torch import Tensor

from hf_sparse.adapters.roles import Child, LayerRoles


@dataclass(frozen=True, kw_only=True)
class Plain(LayerRoles):
    """Two linear layers."""

    up: str

    formula = "down(act(up(x)))"

    @classmethod
    def assignments(cls, names: Sequence[str], act: str) -> Iterator[Plain]:
        for up, down in permutations(names, 2):
            yield cls(up=up, down=down, act=act)

    @property
    def form(self) -> Literal["plain"]:
        return "plain"

    @property
    def before_down(self) -> tuple[str, ...]:
        return (self.up,)

    def linears(self, hidden: int, neurons: int) -> dict[str, tuple[int, int]]:
        return {self.up: (hidden, neurons), self.down: (neurons, hidden)}

    def project(self, child: Child, x: Tensor) -> tuple[Tensor, None]:
        return child(self.up)(x), None
