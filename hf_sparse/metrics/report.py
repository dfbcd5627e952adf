"""The result of a measurement: numbers, a table, JSON, a plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse.metrics.metric import MetricReport
from triton_ops.table import table

if TYPE_CHECKING:
    from torch import nn

    from hf_sparse.metrics.cett_report import CETTReport
    from hf_sparse.tuning import TuneReport

DEFINITION = "sparsity: share of exact zeros among the values that reach the down projections"
"""What every number called sparsity in this package means."""


@dataclass(frozen=True, kw_only=True)
class LayerSparsity:
    """One MLP block, over all measured tokens."""

    name: str
    """Qualified name of the block, as in ``model.get_submodule(name)``."""
    neurons: int
    """Intermediate size F: values per token that reach the down projection."""
    tokens: int
    """Tokens measured, without padding."""
    zeros: int
    """How many of the ``tokens * neurons`` values are exactly zero."""
    dead: int | None = None
    """Neurons that were zero for every token; None if not known, as of experts, or of added files."""
    active: int | None = field(default=None, repr=False, compare=False)
    """Bit i is set if neuron i was not: reports with it add up to one that knows ``dead``."""

    @property
    def sparsity(self) -> float:
        """Share of exact zeros, 0 to 1; NaN for a block that no token reached."""
        return self.zeros / (self.tokens * self.neurons) if self.tokens else math.nan

    @property
    def density(self) -> float:
        """``1 - sparsity``: share of neurons that have to be computed."""
        return 1 - self.sparsity

    def __add__(self, other: LayerSparsity) -> LayerSparsity:
        """The same block over the tokens of both."""
        if (self.name, self.neurons) != (other.name, other.neurons):
            raise ValueError(
                f"{self.name} of {self.neurons} neurons and {other.name} of {other.neurons} are not one "
                "block; only reports of the same model add up."
            )
        active = None if self.active is None or other.active is None else self.active | other.active
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            zeros=self.zeros + other.zeros,
            dead=None if active is None else self.neurons - active.bit_count(),
            active=active,
        )


@dataclass(frozen=True, kw_only=True)
class SparsityReport:
    """What :func:`hf_sparse.measure` found; ``print`` shows it as a table.

    Sparsity is the share of exact zeros among the values that reach the down projections: over tokens and
    neurons for a layer, and over layers, too, for the whole model. Density is ``1 - sparsity``. Reports of
    one model on parts of the data add up, with ``+`` or ``sum``, to the report on all of it.
    """

    layers: tuple[LayerSparsity, ...]
    """The MLP blocks in the order of the model."""
    loss: float
    """Mean cross-entropy of the next token, in nats, over all predicted tokens."""
    tokens: int
    """Tokens that went through the model, without padding; of an encoder-decoder, through both of its stacks.
    """
    predicted_tokens: int
    """Tokens the loss is over: all but the first of each window, or the labels of an encoder-decoder, without
    padding and ignored labels."""
    sequence_length: int | None = None
    """Tokens in a window of text; None if the data came in batches. Perplexity depends on it."""
    metrics: Mapping[str, MetricReport] = field(default_factory=dict, hash=False)
    """What was asked for beside sparsity, by name."""

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over tokens, neurons and layers, 0 to 1."""
        return sum(x.zeros for x in self.layers) / sum(x.tokens * x.neurons for x in self.layers)

    @property
    def density(self) -> float:
        """``1 - sparsity``."""
        return 1 - self.sparsity

    @property
    def dead(self) -> int | None:
        """Neurons that were zero for every token; None if that is not known of each block."""
        counts = [layer.dead for layer in self.layers]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that is too large for a float."""
        return perplexity(self.loss)

    def __add__(self, other: SparsityReport) -> SparsityReport:
        """The report over the data of both.

        Raises:
            ValueError: they are of different models, over windows of different lengths, or not with the same
                metrics.

        """
        if len(self.layers) != len(other.layers):
            raise ValueError(
                f"a report of {len(self.layers)} MLP blocks and one of {len(other.layers)} do not add up; "
                "they must be of the same model."
            )
        if self.sequence_length != other.sequence_length:
            raise ValueError(
                f"reports with sequence_length={self.sequence_length} and {other.sequence_length} do not "
                "add up: the loss depends on it. Measure both with the same."
            )
        if self.metrics.keys() != other.metrics.keys():
            raise ValueError(
                f"reports with metrics={sorted(self.metrics)} and {sorted(other.metrics)} do not add up; "
                "measure both with the same."
            )
        predicted = self.predicted_tokens + other.predicted_tokens
        summed = self.loss * self.predicted_tokens + other.loss * other.predicted_tokens
        return replace(
            self,
            layers=tuple(a + b for a, b in zip(self.layers, other.layers, strict=True)),
            loss=summed / predicted,
            tokens=self.tokens + other.tokens,
            predicted_tokens=predicted,
            metrics={name: one + other.metrics[name] for name, one in self.metrics.items()},
        )

    def __radd__(self, nothing: int) -> SparsityReport:
        return self if nothing == 0 else NotImplemented  # sum() begins with 0

    def __str__(self) -> str:
        def row(name: str, neurons: int, of: LayerSparsity | SparsityReport) -> tuple[str, ...]:
            return name, f"{neurons:,}", f"{of.sparsity:.2%}", f"{of.density:.2%}"

        rows = [
            ("MLP block", "neurons", "sparsity", "density"),
            None,
            *(row(layer.name, layer.neurons, layer) for layer in self.layers),
            None,
            row("all layers", sum(layer.neurons for layer in self.layers), self),
        ]
        window = f" in windows of {self.sequence_length:,}" if self.sequence_length else ""
        own = (
            f"{table(rows)}\n"
            f"perplexity {self.perplexity:.4g} (loss {self.loss:.4f}), {self.tokens:,} tokens{window}\n"
            f"{DEFINITION}"
        )
        return "\n\n".join([own, *map(str, self.metrics.values())])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; an infinite perplexity or a loss that is not a number is None."""
        found = {
            "definition": DEFINITION,
            "sparsity": self.sparsity,
            "density": self.density,
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "tokens": self.tokens,
            "predicted_tokens": self.predicted_tokens,
            "sequence_length": self.sequence_length,
            "layers": [
                {
                    "name": layer.name,
                    "neurons": layer.neurons,
                    "tokens": layer.tokens,
                    "zeros": layer.zeros,
                    "sparsity": _finite(layer.sparsity),
                    "dead": layer.dead,
                }
                for layer in self.layers
            ],
        }
        metrics = {name: one.to_dict() for name, one in self.metrics.items()}
        return found | {"metrics": metrics} if metrics else found

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityReport:
        """The report that :meth:`to_dict` gave as ``data``.

        Raises:
            ValueError: it is none.

        """
        from hf_sparse.metrics.registry import chosen  # which imports every metric

        try:
            layers = tuple(
                LayerSparsity(
                    name=str(one["name"]),
                    dead=None if one.get("dead") is None else _count(one["dead"]),
                    **{k: _count(one[k]) for k in ("neurons", "tokens", "zeros")},
                )
                for one in data["layers"]
            )
            window, loss = data["sequence_length"], data["loss"]
            given = data.get("metrics", {})
            report = cls(
                layers=layers,
                loss=math.nan if loss is None else float(loss),
                tokens=_count(data["tokens"]),
                predicted_tokens=_count(data["predicted_tokens"]),
                sequence_length=None if window is None else _count(window),
                metrics={
                    one.name: MetricReport.from_dict(one, given[one.name]) for one in chosen(list(given))
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        possible = any(one.tokens for one in layers) and all(
            one.zeros <= one.tokens * one.neurons and (one.dead or 0) <= one.neurons for one in layers
        )
        if not possible:
            raise ValueError("its numbers contradict each other.")
        return report

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> SparsityReport:
        """The report in a file that :meth:`to_json` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file.

        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no report of a measurement: {error}") from None

    def plot(self, path: str | os.PathLike[str], *, before: SparsityReport | None = None) -> Path:
        """Draw sparsity by layer into an image file; its ending (png, svg, pdf) chooses the format.

        Args:
            path: where to write.
            before: an earlier report of the same model, drawn beside this one.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: ``before`` is of a model with another number of blocks.

        """
        from hf_sparse.metrics.plot import draw

        return draw(self, Path(path), before)

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: nn.Module | None = None,
        model_name: str | None = None,
        data: str | None = None,
        before: SparsityReport | None = None,
        beside: Mapping[str, SparsityReport] | None = None,
        speed: TuneReport | None = None,
        cett: CETTReport | None = None,
    ) -> str:
        """The report as one HTML page that loads nothing, also written to ``path`` if one is given.

        It has what was measured, sparsity and dead neurons by layer, and a section for each metric; every
        figure has a table of its numbers. Names from elsewhere are text on it, whatever they are.

        Args:
            path: where to write.
            model: the model that was measured; the page then has its class, activation and dtype, versions
                and the machine of this process. It is not run.
            model_name: what to call it; None takes the Hub id or the folder's name of ``model``.
            data: what it was measured on, in words, such as ``"allenai/c4, en, validation"``.
            before: an earlier report of the same model, such as the dense one, whose numbers stand beside.
            beside: more reports by their names, for a plot of sparsity against perplexity.
            speed: what :func:`hf_sparse.tune` found for this model on this machine; with its measurements
                (``force=True``) the page has the speed to expect of the MLP blocks.
            cett: what :func:`hf_sparse.cett_sparsity` found for this model.

        Raises:
            OSError: the file cannot be written.
            PatchError: ``model`` has no MLP blocks.
            ValueError: ``before`` is of a model with other blocks, or ``model``, ``speed`` or ``cett`` is of
                another model than this report.

        """
        from hf_sparse.report_page import contents, write_html

        page = contents(
            self,
            model=model,
            model_name=model_name,
            data=data,
            before=before,
            beside=beside,
            speed=speed,
            cett=cett,
        )
        return _written(write_html(page), path)

    def to_markdown(self, path: str | os.PathLike[str] | None = None, **options: Any) -> str:
        """The same page as Markdown, with tables in the place of figures.

        Args:
            path: where to write.
            options: as of :meth:`to_html`.

        Raises:
            OSError, PatchError, ValueError: as of :meth:`to_html`.
            TypeError: an option is not known.

        """
        from hf_sparse.report_page import contents, write_markdown

        return _written(write_markdown(contents(self, **options)), path)


def perplexity(loss: float) -> float:
    """That of a mean loss in nats; infinite where it is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
