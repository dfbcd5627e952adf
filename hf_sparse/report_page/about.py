"""What was measured, on what and where: the facts that every number on a page depends on."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from torch import nn

from hf_sparse.errors import PatchError
from hf_sparse.metrics.report import SparsityReport
from hf_sparse.observing import blocks_of
from hf_sparse.observing.running import inner_model, without_copies
from hf_sparse.patch_report import in_words, parts_in_words
from hf_sparse.report_page.document import Section, Table, Text
from hf_sparse.surroundings import machine, versions

_PACKAGES = ("hf_sparse", "torch", "transformers", "triton", "python")


def about_section(
    report: SparsityReport, model: nn.Module | None, model_name: str | None, data: str | None
) -> Section:
    """The facts as a table; those of the model and of this process only if ``model`` is given.

    Raises:
        PatchError: ``model`` has no MLP blocks.
        ValueError: ``model`` is not the one that was measured.

    """
    rows = [("Model", model_name or (name_of(model) if model is not None else "not told"))]
    if model is not None:
        rows += _model_facts(report, model)
    window = f", in windows of {report.sequence_length:,}" if report.sequence_length else ", in batches"
    rows += [
        ("Data", data or "not told"),
        ("Tokens", f"{report.tokens:,}{window}; the loss is over {report.predicted_tokens:,}"),
        ("Page written", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    if model is not None:
        known = versions()
        rows.append(("Versions", ", ".join(f"{one} {known[one]}" for one in _PACKAGES if one in known)))
        rows.append(("Machine", machine_in_words()))
        told = "Versions and machine are of the process that wrote this page, where the model is loaded."
    else:
        told = (
            "The page was written from a report alone, which does not tell the model's facts or the machine."
        )
    table = Table(
        caption="The model, the text and the process", head=("Fact", "Value"), rows=tuple(rows), words=True
    )
    return Section(heading="What was measured", parts=(table, Text(told)))


def machine_in_words() -> str:
    """Processor, threads and GPU of this process."""
    found = machine()
    gpu = f"; {found['gpus']} x {found['gpu']}" if "gpu" in found else "; no GPU"
    threads = f"{found['threads']} thread" + ("s" if found["threads"] != 1 else "")
    return f"{found['cpu']}, {found['cores']} cores, {threads}{gpu}"


def name_of(model: nn.Module) -> str:
    """Its Hub id, or the name of the folder it came from: where a user keeps files is nobody's business."""
    inner = inner_model(without_copies(model))
    name = str(inner.name_or_path or "")
    if not name:
        return f"a {type(inner).__name__} made in memory"
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _model_facts(report: SparsityReport, model: nn.Module) -> list[tuple[str, str]]:
    blocks = blocks_of(model)
    here, there = {block.name for block in blocks}, {layer.name for layer in report.layers}
    if missing := sorted(there - here):
        raise ValueError(
            f"model has no MLP block {missing[0]!r}, which the report is about: give the model that was "
            "measured, or none."
        )
    inner = inner_model(without_copies(model))
    shapes = Counter(f"{b.form}, {b.hidden_size:,} to {b.intermediate_size:,}" for b in blocks)
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in inner.parameters())
    devices = Counter(p.device.type for p in inner.parameters())
    return [
        ("Class", f"{type(inner).__name__}, {sum(p.numel() for p in inner.parameters()):,} parameters"),
        ("MLP blocks", "; ".join(f"{count} x {shape}" for shape, count in shapes.items())),
        ("Activation", _activation(inner)),
        ("Dtype, device", f"{', '.join(dtypes)}; {', '.join(devices)}"),
    ]


def _activation(inner: nn.Module) -> str:
    from hf_sparse.patching import inspect  # which the package imports after its metrics

    try:
        report = inspect(inner)
    except PatchError as error:
        return f"not known: {error}"
    if not report.patched:
        return f"{report.original_activation or 'its own'}, as it comes; not patched"
    told = []
    for one in report.patched:
        assert one.config is not None
        words = [in_words(one.config), *parts_in_words(one.config)]
        in_place = f" in place of {one.original_activation}" if one.original_activation else ""
        told.append(f"{'; '.join(words)}{in_place}" + ("" if one.part is None else f" (part {one.part})"))
    return "; ".join(told)
