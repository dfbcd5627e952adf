"""What a metric is: an observer of each block, and numbers of each that add up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from hf_sparse.adapters import Block
from hf_sparse.checks import shown
from hf_sparse.observing import Observer
from triton_ops.table import table

Self = TypeVar("Self", bound="LayerMetric")


@dataclass(frozen=True, kw_only=True)
class LayerMetric(ABC):
    """What a metric found of one MLP block.

    But for ``name`` and ``neurons`` every field is a sum over tokens: a number, a tuple of numbers, or None
    where it cannot be known, and what is unknown of a part is unknown of the whole.

    Raises:
        ValueError: the numbers are none, or contradict each other (:meth:`check`).

    """

    name: str
    """Qualified name of the block, as in ``model.get_submodule(name)``."""
    neurons: int
    """Intermediate size F."""
    tokens: int
    """Tokens seen, without padding; inside of experts, a token for each expert that it went to."""

    def __post_init__(self) -> None:
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        counts = all(type(number) is int for number in (self.neurons, self.tokens))
        if not (isinstance(self.name, str) and counts and all(map(_is_sum, numbers.values()))):
            raise ValueError(f"what is given for the block {shown(self.name)} are no sums over tokens.")
        if not self.check():
            raise ValueError(f"the numbers of the block {shown(self.name)} contradict each other.")

    def check(self) -> bool:
        """Whether the numbers may be those of one block."""
        return True

    @abstractmethod
    def shares(self) -> dict[str, tuple[float, float] | None]:
        """The columns of the table: what is counted, and out of how much; None if it is not known.

        Of several blocks both are added up.
        """

    def others(self) -> dict[str, float | None]:
        """More columns, shares of this block that say nothing of several."""
        return {}

    def __add__(self: Self, other: Self) -> Self:
        """The same block over the tokens of both.

        Raises:
            ValueError: they are not of one block and metric.

        """
        if type(self) is not type(other) or (self.name, self.neurons) != (other.name, other.neurons):
            raise ValueError(
                f"{self.name} of {self.neurons} neurons and {other.name} of {other.neurons} are not the same "
                "metric of one block; only reports of the same model add up."
            )
        names = [f.name for f in fields(self) if f.name not in ("name", "neurons")]
        return replace(self, **{one: _added(getattr(self, one), getattr(other, one)) for one in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the fields, and the columns of the table as ``shares``."""
        columns = {title: ratio(*pair) if pair else None for title, pair in self.shares().items()}
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        shares = {title: _finite(value) for title, value in (columns | self.others()).items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} | {"shares": shares}

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` gave as ``data``.

        Raises:
            ValueError: it is no such thing.
            KeyError: a field is missing.

        """
        found: dict[str, Any] = {f.name: data[f.name] for f in fields(cls)}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return cls(**given)


class Metric(Observer):
    """Looks at one block for a metric. A subclass in a module of this package is a metric by its ``name``.

    Raises:
        PatchError: it has no meaning for ``block``, or cannot be had of it; the message names the block.

    """

    name: ClassVar[str]
    """What :func:`hf_sparse.measure` calls it."""
    about: ClassVar[str]
    """What is counted: the line under the table."""
    layer: ClassVar[type[LayerMetric]]
    """What :meth:`result` gives."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.neurons = block.intermediate_size
        self.tokens = 0
        self.routed = False
        """Whether values of experts were among those seen."""

    def update(self, values: Tensor, routed: bool) -> None:
        width = self.block.hidden_size if self.site in ("x", "y") else self.neurons
        if values.shape[-1] != width:
            raise ValueError(
                f"{self.block.name} has {width} values of a token at the site {self.site!r}, and "
                f"{values.shape[-1]} arrive: they are split between processes. Measure {self.name!r} on a "
                "model that is not."
            )
        self.tokens += len(values)
        self.routed |= routed
        self.count(values, routed)

    @abstractmethod
    def count(self, values: Tensor, routed: bool) -> None:
        """Take in ``values`` ``[T, F]``, tokens without padding, of any floating dtype."""

    @abstractmethod
    def result(self) -> LayerMetric:
        """What was found; also if nothing was seen."""

    def about_block(self) -> dict[str, Any]:
        """The fields that every result has."""
        return {"name": self.block.name, "neurons": self.neurons, "tokens": self.tokens}


@dataclass(frozen=True)
class MetricReport:
    """What one metric found of a model; ``print`` shows it as a table. Adds up as a SparsityReport does."""

    metric: str
    """Its name."""
    about: str
    """What is counted."""
    layers: tuple[LayerMetric, ...]
    """The MLP blocks in the order of the model."""

    def __add__(self, other: MetricReport) -> MetricReport:
        """The report over the data of both.

        Raises:
            ValueError: they are of different metrics or models.

        """
        if self.metric != other.metric or len(self.layers) != len(other.layers):
            raise ValueError(
                f"{self.metric!r} of {len(self.layers)} MLP blocks and {other.metric!r} of "
                f"{len(other.layers)} do not add up; they must be the same metric of the same model."
            )
        return replace(self, layers=tuple(a + b for a, b in zip(self.layers, other.layers, strict=True)))

    def total(self) -> dict[str, float | None]:
        """The columns that have a meaning over all blocks; None where one block does not know."""
        found: dict[str, float | None] = {}
        for title in self.layers[0].shares() if self.layers else ():
            pairs = [layer.shares()[title] for layer in self.layers]
            known = [pair for pair in pairs if pair is not None]
            found[title] = ratio(*map(sum, zip(*known, strict=True))) if len(known) == len(pairs) else None
        return found

    def rows(self) -> list[tuple[str, ...] | None]:
        """The cells of the table, titles first and all blocks last, with None for a rule."""
        total = self.total()
        others = list(self.layers[0].others()) if self.layers else []
        rows: list[tuple[str, ...] | None] = [("MLP block", "neurons", *total, *others), None]
        for layer in self.layers:
            shares = [ratio(*pair) if pair else None for pair in layer.shares().values()]
            cells = map(_cell, [*shares, *layer.others().values()])
            rows.append((layer.name, f"{layer.neurons:,}", *cells))
        neurons = sum(layer.neurons for layer in self.layers)
        blank = [""] * len(others)
        rows += [None, ("all layers", f"{neurons:,}", *map(_cell, total.values()), *blank)]
        return rows

    def __str__(self) -> str:
        return f"{table(self.rows())}\n{self.metric}: {self.about}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not known, or a share of nothing, is None."""
        total = {title: _finite(value) for title, value in self.total().items()}
        return {
            "about": self.about,
            "shares": total,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, metric: type[Metric], data: Mapping[str, Any]) -> MetricReport:
        """What :meth:`to_dict` gave as ``data`` of ``metric``.

        Raises:
            ValueError: it is no such thing.
            KeyError: a field is missing.

        """
        return cls(metric.name, metric.about, tuple(metric.layer.from_dict(one) for one in data["layers"]))


def ratio(count: float, of: float) -> float:
    """NaN out of nothing."""
    return count / of if of else math.nan


def _cell(share: float | None) -> str:
    return "?" if share is None else "-" if math.isnan(share) else f"{share:.2%}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _added(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return None
    if isinstance(a, tuple):
        return tuple(x + y for x, y in zip(a, b, strict=True))
    return a + b


def _is_sum(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_number, value))
    return value is None or _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
