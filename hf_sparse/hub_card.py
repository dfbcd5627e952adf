"""The model card: what a pushed model is, how to load it, what was measured; nothing that is not known."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_sparse.activations.config import ORIGINAL
from hf_sparse.card_marks import PATCH, PUSHED
from hf_sparse.card_metadata import BY_US, TAGS, with_metadata
from hf_sparse.hub_facts import Facts, is_id
from hf_sparse.markdown_table import markdown_table
from hf_sparse.metrics import SparsityReport
from hf_sparse.metrics.report import DEFINITION
from hf_sparse.model_card import fingerprint, runtimes
from hf_sparse.patch_report import PatchReport, in_words, parts_in_words

_AUTO = {
    "AutoModelForImageTextToText": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "image-text-to-text"),
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING", "text-generation"),
    "AutoModelForSeq2SeqLM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", None),
    "AutoModelForSpeechSeq2Seq": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "automatic-speech-recognition"),
    "AutoModelForMaskedLM": ("MODEL_FOR_MASKED_LM_MAPPING", "fill-mask"),
    "AutoModelForSequenceClassification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "text-classification",
    ),
    "AutoModelForTokenClassification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "token-classification"),
    "AutoModelForQuestionAnswering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING", "question-answering"),
    "AutoModelForImageClassification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "image-classification"),
    "AutoModel": ("MODEL_MAPPING", "feature-extraction"),
}
"""What loads models by their config: the mapping each goes by, and the Hub's name of the task."""


def full_card(
    readme: str,
    model: PreTrainedModel,
    patched: PatchReport,
    facts: Facts,
    *,
    repo_id: str,
    revision: str | None,
    tokenizer: Any,
) -> str:
    """``readme``, which has the section of a saved model, with all the rest of the card.

    Raises:
        ValueError: its metadata cannot be read.

    """
    if facts.base_model == repo_id:  # loaded from where it goes to
        facts = replace(facts, base_model=None)
    auto, task = _auto_class(model)
    text = "\n\n".join(
        part.strip()
        for part in (
            _what(patched, facts),
            _use(model, patched, auto, repo_id, revision, tokenizer),
            _measured(facts),
            _training(facts),
        )
        if part
    )
    readme = PUSHED.put(readme, PUSHED.marked(text, fingerprint(patched)), before=[PATCH])
    return with_metadata(readme, _metadata(patched, facts, repo_id, task), given=facts.given)


# ---- the text


def _what(patched: PatchReport, facts: Facts) -> str:
    sentences = []
    for one in patched.patched:
        assert one.config is not None
        of = "" if one.part is None else f" of the part `{one.part}`"
        original = f"`{one.original_activation}`" if one.original_activation else "the original activation"
        if one.config.activation.name == ORIGINAL:
            sentences.append(f"{len(one.blocks)} MLP blocks{of} run in `hf_sparse` with {original}.")
        else:
            new = f"`{in_words(one.config)}` in place of {original}"
            sentences.append(f"{len(one.blocks)} MLP blocks{of} of this `{one.model_class}` compute {new}.")
        if parts := parts_in_words(one.config):
            sentences.append(f"They also have {' and '.join(f'`{part}`' for part in parts)}.")
    if facts.base_model:
        sentences.append(f"It derives from `{facts.base_model}`.")
    if any(one.config is not None and one.config.gives_zeros for one in patched.patched):
        sentences.append(
            "A neuron whose activation is exactly zero need not be computed: the Python package `hf_sparse` "
            "skips it."
        )
    return "## What it is\n\n" + " ".join(sentences)


def _use(
    model: nn.Module,
    patched: PatchReport,
    auto: str | None,
    repo_id: str,
    revision: str | None,
    tokenizer: Any,
) -> str:
    own = type(model).__module__.startswith("transformers.")
    loader = auto if auto and own else type(model).__name__
    where = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    imports, lines = [loader] if own else [], [f"model = {loader}.from_pretrained({where})"]
    if tokenizer is not None:
        from transformers import ProcessorMixin  # it brings the tokenizers

        is_processor = isinstance(tokenizer, ProcessorMixin)
        name, kind = ("processor", "AutoProcessor") if is_processor else ("tokenizer", "AutoTokenizer")
        imports.append(kind)
        lines.append(f"{name} = {kind}.from_pretrained({where})")
        if loader == "AutoModelForCausalLM" and not is_processor:
            lines += [
                'inputs = tokenizer("Once upon a time", return_tensors="pt")',
                "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
            ]
    head = [f"from transformers import {', '.join(imports)}"] if imports else []
    if not own:
        head.append(f"# {loader} is no class of transformers: import it from where it is")
    with_it = ["import hf_sparse  # pip install hf-sparse", *head, "", *lines]
    needs = " Nothing here needs `trust_remote_code`." if own else ""
    rows = dict(runtimes(patched))
    plain = rows["transformers alone"]
    if all(one.stock_name is not None for one in patched.patched):
        without = (
            "Without the package, transformers loads it as well, and computes the same with all neurons:\n\n"
            + _fenced("\n".join([*head, "", *lines]), "python")
        )
    else:
        without = f"Without the package, transformers {plain}."
        if older := rows.get("transformers 4 alone"):
            without += f" Transformers 4 loads it: {older}."
    return (
        "## How to load it\n\n"
        + _fenced("\n".join(with_it), "python")
        + f"\n\nThe import is what makes `from_pretrained` build the sparse blocks.{needs}\n\n{without}\n\n"
        "Other runtimes may compute another model; see the table under *Sparse activations*."
    )


def _measured(facts: Facts) -> str:
    report, before, lines = facts.report, facts.before, []
    if report is not None:
        rows = [["sparsity", f"{report.sparsity:.2%}"], ["perplexity", f"{report.perplexity:.4g}"]]
        rows.append(["tokens", f"{report.tokens:,}"])
        head = ["", "this model"]
        if before is not None:
            head.insert(1, "before")
            cells = f"{before.sparsity:.2%}", f"{before.perplexity:.4g}", f"{before.tokens:,}"
            for row, cell in zip(rows, cells, strict=True):
                row.insert(1, cell)
        on = f"on {facts.evaluated_on}" if facts.evaluated_on else "on text that the author did not name"
        window = f", in windows of {report.sequence_length:,} tokens" if report.sequence_length else ""
        lines += [
            f"With `hf_sparse.measure`, {on}{window}. {DEFINITION[0].upper()}{DEFINITION[1:]}.",
            markdown_table(head, rows),
            f"<details><summary>By layer</summary>\n\n{_by_layer(report, before)}\n\n</details>",
        ]
        if before is not None and before.tokens != report.tokens:
            lines.insert(1, "The numbers of tokens differ, so the text was not the same.")
    if facts.speed is not None:
        one_line = "\n" not in facts.speed
        lines.append(f"Speed: {facts.speed}" if one_line else "Speed:\n\n" + _fenced(facts.speed, "text"))
    missing = [
        name
        for name, absent in (
            ("sparsity", report is None),
            ("perplexity", report is None),
            ("the dense model", report is not None and before is None),
            ("speed", facts.speed is None),
        )
        if absent
    ]
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}.")
    return "## Measured\n\n" + "\n\n".join(lines)


def _by_layer(report: SparsityReport, before: SparsityReport | None) -> str:
    old = {} if before is None else {layer.name: layer for layer in before.layers}
    rows = []
    for layer in report.layers:
        row = [f"`{layer.name}`", f"{layer.neurons:,}", _share(layer.sparsity)]
        if before is not None:
            row.insert(2, _share(old[layer.name].sparsity) if layer.name in old else "")
        rows.append(row)
    return markdown_table(["MLP block", "neurons", *(["before"] if before else []), "sparsity"], rows)


def _share(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "no token"


def _training(facts: Facts) -> str:
    if facts.recipe is None and not facts.datasets:
        return ""
    lines = ["## Training"]
    if facts.datasets:
        lines.append(f"Trained on {', '.join(f'`{one}`' for one in facts.datasets)}.")
    if facts.recipe is not None:
        lines.append("The recipe:\n\n" + _fenced(facts.recipe, "yaml"))
    return "\n\n".join(lines)


def _fenced(text: str, kind: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text.strip(chr(10))}\n{fence}"


# ---- the metadata


def _metadata(patched: PatchReport, facts: Facts, repo_id: str, task: str | None) -> ModelCardData:
    names = {one.config.activation.name for one in patched.patched if one.config is not None} - {ORIGINAL}
    results = _results(facts)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        tags=[*TAGS, *sorted(names)],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _results(facts: Facts) -> list[EvalResult]:
    """In the Hub's form, which wants to know the data set."""
    report, data = facts.report, facts.evaluated_on
    if report is None or data is None:
        return []
    values = {"perplexity": report.perplexity, "activation_sparsity": report.sparsity}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data if is_id(data) and "/" in data else "text",
            dataset_name=data,
            metric_type=kind,
            metric_value=round(value, 6),
            metric_name=f"{kind.replace('_', ' ').capitalize()}{BY_US}",
        )
        for kind, value in values.items()
        if math.isfinite(value)
    ]


def _auto_class(model: nn.Module) -> tuple[str | None, str | None]:
    """What loads a model of this class by its config, and the Hub's name of what it does; None if unknown."""
    for name, (mapping, task) in _AUTO.items():
        found = getattr(modeling_auto, mapping, {}).get(type(model.config), ())
        if type(model) in (found if isinstance(found, tuple) else (found,)):
            return name, task
    return None, None
