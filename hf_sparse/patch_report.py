"""What a patch changed, or would change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.adapters import Block, Skipped
from hf_sparse.config import SparsityConfig


@dataclass(frozen=True)
class PatchReport:
    """The blocks concerned and what was left alone; prints as a summary."""

    model_class: str
    config: SparsityConfig | None
    """None if the model is not patched."""
    blocks: Sequence[Block]
    """The blocks that are patched, or that :func:`hf_sparse.patch` would patch."""
    skipped: Sequence[Skipped]
    """Modules with an activation that were left as they are."""
    original_activation: str | None = None
    """The stock activation, as the model's config names it."""
    stock_name: str | None = None
    """The activation name under which plain transformers loads the patched model; None if it cannot."""
    field: str | None = None
    """The config field that names the activation of a patched model; None if no field does."""
    part: str | None = None
    """Which part of a model that is made of several; None of one that is not."""
    notes: Sequence[str] = ()
    """What else to know of the model as it is in this process."""
    others: Sequence[PatchReport] = ()
    """On the other parts, of a report on all."""

    @property
    def patched(self) -> list[PatchReport]:
        """This report and the others, those on what is patched."""
        return [report for report in (self, *self.others) if report.config is not None]

    def __str__(self) -> str:
        return "\n".join(map(str.rstrip, (self._text(), *(other._text() for other in self.others))))

    def _text(self) -> str:
        verb = "could be patched" if self.config is None else "patched"
        of = "" if self.part is None else f", part {self.part!r}"
        lines = [f"{self.model_class}{of}: {len(self.blocks)} MLP blocks {verb}"]
        shapes = Counter(
            (b.stock_class.__name__, b.form, b.hidden_size, b.intermediate_size) for b in self.blocks
        )
        for (name, form, hidden, intermediate), count in shapes.items():
            lines.append(f"  {count} x {name} ({form}), {hidden} -> {intermediate} -> {hidden}")
        if self.config is not None:
            lines.append(f"  activation: {self.original_activation} -> {in_words(self.config)}")
            lines += [f"  with {part}" for part in parts_in_words(self.config)]
            loads = f"as {self.stock_name!r}" if self.stock_name else "refused; it needs `import hf_sparse`"
            lines.append(f"  in plain transformers: {loads}")
        for by, count in Counter(filter(None, (b.replaced_forward for b in self.blocks))).items():
            lines.append(f"  WARNING: the forward of {count} blocks was replaced by {by}")
        lines += [f"  WARNING: {note}" for note in self.notes]
        for (name, reason), count in Counter((s.class_name, s.reason) for s in self.skipped).items():
            lines.append(f"  left as is: {count} x {name}: {reason}")
        return "\n".join(lines)


def in_words(config: SparsityConfig) -> str:
    """The activation that a config puts in, with its numbers."""
    name = config.activation.name
    return _with_details(name, {k: v for k, v in config.activation.to_dict().items() if k != "name"})


def parts_in_words(config: SparsityConfig) -> list[str]:
    """What a config has beside the activation, with its numbers."""
    return [_with_details(name, part.to_dict()) for name, part in config.others]


def _with_details(name: str, fields: Mapping[str, Any]) -> str:
    details = []
    for field, value in fields.items():
        if isinstance(value, Mapping):
            details.append(_with_details(field, value))
        elif isinstance(value, list):
            details.append(f"{field}s {min(value):g} to {max(value):g}")
        elif field == "mix":
            details.append(f"mixed in at {value:g}")
        elif isinstance(value, bool | str):
            details.append(field if value is True else f"{field} {value}")
        else:
            details.append(f"{field} {value:g}")
    return name + (f" ({', '.join(details)})" if details else "")
