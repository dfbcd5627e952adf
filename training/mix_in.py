"""A second data set that is mixed into the first: a part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal

from hf_sparse.checks import known, mapping
from hf_sparse.fields import check_types, require


@dataclass(frozen=True, kw_only=True)
class MixIn:
    """Which data set, and how much of it.

    Raises:
        ValueError: a field is out of its range.

    """

    dataset: str
    """As the field dataset of a recipe."""
    share: float
    """Of the training sequences, and so of the tokens."""
    config: str | None = None
    revision: str | None = None
    text_field: str = "text"
    txt_unit: Literal["paragraph", "line", "document"] = "paragraph"
    epochs: int = 1
    """Passes over it before a run that wants more ends with an error."""

    def __post_init__(self) -> None:
        check_types(self, "mix_in.")
        require(0 < self.share < 1, "mix_in.share", self.share, "it must be a fraction between 0 and 1")
        require(self.epochs >= 1, "mix_in.epochs", self.epochs, "it must be at least 1")

    @classmethod
    def read(cls, value: Any) -> MixIn:
        """From a mapping of its fields.

        Raises:
            ValueError: names the field, its value and the mend.

        """
        given = mapping("mix_in", value)
        known("mix_in", list(given), [f.name for f in fields(cls)])
        for name in ("dataset", "share"):
            if name not in given:
                raise ValueError(f"mix_in has no {name}; it needs a dataset and a share, such as 0.2.")
        return cls(**given)


class Turns:
    """Says of each sequence of a stream whether it is the second source's turn.

    Each of V streams is a V-th of a turn ahead of the one before. So when all have given n sequences,
    ``floor(V * n * share)`` of these are of the second source: every global batch has its share, but for one.
    """

    def __init__(self, share: float, stream: int, streams: int) -> None:
        exact = Fraction(share).limit_denominator(10**6)
        self._up, self._down = exact.numerator * streams, exact.denominator * streams
        self._ahead = stream * exact.denominator

    def second(self, sequence: int) -> bool:
        """Of number ``sequence``, counted from 0 over the whole run."""
        before = (sequence * self._up + self._ahead) // self._down
        return ((sequence + 1) * self._up + self._ahead) // self._down > before
