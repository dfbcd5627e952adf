"""What the config says of the input of one linear layer: one name in ``inputs``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.adapters.pruning import Pruning
from hf_sparse.checks import mapping, numbers, shown

_FIELDS = ("threshold", "center", "weighted")


@dataclass(frozen=True)
class PrunedInput:
    """:class:`~hf_sparse.adapters.pruning.Pruning` for every block, or one for each."""

    threshold: float | tuple[float, ...]
    center: float | tuple[float, ...] = 0.0
    weighted: bool = False

    @classmethod
    def read(cls, field: str, value: Any) -> PrunedInput:
        """From a threshold, or a mapping of the fields.

        Raises:
            ValueError: names what is wrong in ``field``.

        """
        given = mapping(field, value) if isinstance(value, Mapping) else {"threshold": value}
        if unknown := given.keys() - set(_FIELDS):
            raise ValueError(
                f"{field} has the field {shown(min(unknown))}, which is none of {', '.join(_FIELDS)}."
            )
        if "threshold" not in given:
            raise ValueError(f"{field} has no threshold.")
        weighted = given.get("weighted", False)
        if not isinstance(weighted, bool):
            raise ValueError(f"{field} has weighted={shown(weighted)}; it is true or false.")
        found = cls(
            numbers(field, given["threshold"]), numbers(f"{field}.center", given.get("center", 0.0)), weighted
        )
        if (least := min(_each(found.threshold))) < 0:
            raise ValueError(f"{field}={least} is negative; a threshold is at least 0.")
        return found

    def to_plain(self) -> Any:
        """JSON types, without what has its default; a threshold that is alone is given as such."""
        threshold, center = (list(v) if isinstance(v, tuple) else v for v in (self.threshold, self.center))
        found: dict[str, Any] = {"threshold": threshold}
        if any(_each(self.center)):
            found["center"] = center
        if self.weighted:
            found["weighted"] = True
        return found if len(found) > 1 else threshold

    @property
    def lengths(self) -> list[int]:
        """For how many blocks there are values, where there is more than one."""
        return [len(value) for value in (self.threshold, self.center) if isinstance(value, tuple)]

    def arranged(self, order: Sequence[int]) -> PrunedInput:
        """With the values of blocks in another order."""

        def one(value: float | tuple[float, ...]) -> float | tuple[float, ...]:
            return tuple(value[i] for i in order) if isinstance(value, tuple) else value

        return PrunedInput(one(self.threshold), one(self.center), self.weighted)

    def at(self, index: int) -> Pruning:
        """That of the ``index``-th patched block."""
        threshold, center = (v[index] if isinstance(v, tuple) else v for v in (self.threshold, self.center))
        return Pruning(threshold, center, self.weighted)


def _each(value: float | tuple[float, ...]) -> Iterator[float]:
    return iter(value if isinstance(value, tuple) else (value,))
