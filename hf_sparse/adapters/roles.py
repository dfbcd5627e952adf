"""Which child of an MLP plays which part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Names of an MLP's children by the part they play.

    ``gated``: ``down(act(gate(x)) * up(x))``; ``plain``: ``down(act(up(x)))``, where ``gate`` is None.
    """

    gate: str | None
    up: str
    down: str
    act: str

    @property
    def form(self) -> Literal["gated", "plain"]:
        return "plain" if self.gate is None else "gated"
