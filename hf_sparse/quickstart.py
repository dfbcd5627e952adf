"""The whole road in one command: a dense model becomes a sparse one, measured before and after.

Load, measure, substitute ReLU, finetune with progressive L1 (the training application), reload through
``AutoModelForCausalLM``, measure, time, and time the sparsity that came out at the size of a real model. The
embedded model and text need no network; any other model and data set take the very same path.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus
from hf_sparse.gain import MODEL, Gain, measure_gain
from hf_sparse.launch import finetune
from hf_sparse.metrics import DEFINITION, SparsityReport, measure
from hf_sparse.texts import EMBEDDED, evaluation_texts
from hf_sparse.windows import context_length
from triton_ops.table import table

DEFAULT_OUTPUT = "runs/quickstart"
_HOLDOUT = 0.01
# The recipe of the embedded model on another one: its learning rate would ruin a pretrained model, and its
# batches would take hours. This is a look at the road in minutes, not a finetune; prosparse.yaml is one.
_PRETRAINED = {
    "max_steps": 24,
    "global_batch": 8,
    "micro_batch": 2,
    "learning_rate": 3e-4,
    "weight_decay": 0.0,
    "methods.l1.scale": 0.3,
    "eval_every": 0,
    "eval_tokens": 1024,  # for its log; what the quickstart tells, it measures itself
}
_PRETRAINED_LENGTH = 256  # tokens of a sequence, in training as in measuring
_DENSE_NOTE = (
    "This model is too small for skipping to pay (its MLP weights fit in the processor's cache, and Python\n"
    "takes most of a token's time), so the package computes all of its neurons: both speeds are dense."
)


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What a quickstart found; prints as the table it ends with."""

    model: str
    dataset: str
    before: SparsityReport
    """The dense model."""
    substituted: SparsityReport
    """With ReLU in place, before any training."""
    after: SparsityReport
    """Finetuned, saved and reloaded."""
    dense_speed: float
    """Greedy decode of the dense model, tokens per second, batch 1."""
    sparse_speed: float
    """The same of the sparse model."""
    skips: bool
    """Whether the sparse model skipped neurons there; if not, it was no use at its size."""
    gain: Gain | None
    """What its sparsity is worth at the size of a real model; None if that could not be measured here."""
    output: Path
    """Folder with everything written."""
    seconds: float
    """Duration of the whole run."""

    def __str__(self) -> str:
        reports = (self.before, self.substituted, self.after)
        layers = zip(*(report.layers for report in reports), strict=True)
        rows = [
            ("sparsity of", "before", "ReLU put in", "after"),
            None,
            *((same[0].name, *(f"{layer.sparsity:.1%}" for layer in same)) for same in layers),
            None,
            ("all layers: sparsity", *(f"{r.sparsity:.1%}" for r in reports)),
            ("perplexity", *(f"{r.perplexity:.2f}" for r in reports)),
            ("decode tokens/s", f"{self.dense_speed:.0f}", "", f"{self.sparse_speed:.0f}"),
        ]
        ratio = self.sparse_speed / self.dense_speed
        notes = [
            f"{DEFINITION};",
            f"measured on {self.after.tokens:,} held-out tokens. Decode speed: {ratio:.2f}x.",
        ]
        if not self.skips:
            notes.append(_DENSE_NOTE)
        if self.gain is not None:
            notes.append(str(self.gain))
        return "\n".join([table(rows), *notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "before": self.before.to_dict(),
            "substituted": self.substituted.to_dict(),
            "after": self.after.to_dict(),
            "dense_tokens_per_second": self.dense_speed,
            "sparse_tokens_per_second": self.sparse_speed,
            "skips": self.skips,
            "gain": None if self.gain is None else self.gain.to_dict(),
            "seconds": self.seconds,
            "hf_sparse": hf_sparse.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }


def quickstart(
    *,
    model: str = EMBEDDED,
    dataset: str | None = None,
    output: str | Path | None = None,
    training: Sequence[str] = (),
    eval_tokens: int | None = None,
    decode_tokens: int = 96,
    say: Callable[[str], None] = print,
) -> QuickstartResult:
    """Make ``model`` sparse on ``dataset``, with every step shown.

    Args:
        model: Hub id or local folder; ``"tiny"`` is the embedded model.
        dataset: Hub id, local file or folder; ``"tiny"`` is the running Python's documentation. None means
            that for the embedded model and ``allenai/c4`` for any other.
        output: a folder that is new or empty. None means ``runs/quickstart``, or the first of
            ``runs/quickstart-2``, ``-3``, … that is not there: earlier results are never touched.
        training: more options for the training application, such as ``["--max-steps", "50"]``.
        eval_tokens: held-out tokens measured before and after; None means 32,768 of the embedded text and
            4,096 for another model.
        decode_tokens: tokens generated in each timing.
        say: receives the lines of the story.

    Raises:
        ValueError: ``output`` is not empty, or the model or data cannot be used.
        RuntimeError: the training application failed; its own message was printed before.

    """
    started = time.perf_counter()
    dataset = dataset or (EMBEDDED if model == EMBEDDED else "allenai/c4")
    folder = _new_folder(output)
    source = str(TINY_MODEL) if model == EMBEDDED else model

    name = "the embedded model" if model == EMBEDDED else model
    text = "the documentation of Python" if dataset == EMBEDDED else dataset
    say(f"[1/6] Load {name} and measure it on held-out text of {text}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense = _load(source)
    length = min(context_length(dense) or 1024, 1024)
    pretrained = {} if model == EMBEDDED else _PRETRAINED
    if pretrained:
        length = min(length, _PRETRAINED_LENGTH)
    eval_tokens = eval_tokens or (4096 if pretrained else 32_768)
    texts = _evaluation_texts(dataset, tokenizer, eval_tokens)

    def measured(of: Any) -> SparsityReport:
        return measure(
            of, texts, tokenizer=tokenizer, sequence_length=length, max_tokens=eval_tokens, progress=True
        )

    before = measured(dense)
    say(f"      perplexity {before.perplexity:.2f}, activation sparsity {before.sparsity:.1%}")

    say("[2/6] Put ReLU in the place of the activation: hf_sparse.patch(model, 'relu')")
    say(_indented(str(hf_sparse.patch(dense, "relu"))))
    substituted = measured(dense)
    say(f"      untrained: perplexity {substituted.perplexity:.2f}, sparsity {substituted.sparsity:.1%}")
    del dense  # the memory is the trainer's now

    say("[3/6] Finetune with a progressive L1 penalty: hf-sparse finetune --config quickstart")
    data = str(python_corpus().write(folder / "text")) if dataset == EMBEDDED else dataset
    options = {"model": source, "dataset": data, "output_dir": folder / "finetune", "holdout": _HOLDOUT}
    options |= {"sequence_length": length, **pretrained}
    arguments = [text for key, value in options.items() for text in (_option(key), str(value))]
    status = finetune(["--config", "quickstart", *arguments, *training])
    if status != 0:
        raise RuntimeError(f"finetuning ended with exit status {status}; its message is above.")

    final = folder / "finetune" / "final"
    say(f"[4/6] Load {final} with AutoModelForCausalLM and measure it")
    sparse = _load(final)
    after = measured(sparse)
    say(f"      perplexity {after.perplexity:.2f}, activation sparsity {after.sparsity:.1%}")

    say("[5/6] Time greedy decoding, dense and sparse by turns")
    dense_speed, sparse_speed = _decode_speeds([_load(source), sparse], length, decode_tokens)
    say(f"      {dense_speed:.0f} and {sparse_speed:.0f} tokens/s")

    share = round(after.sparsity, 2)
    say(f"[6/6] Time an MLP of the size of {MODEL} at this sparsity, dense and skipping by turns")
    try:
        gain = measure_gain(min(share, 0.99))
    except RuntimeError as obstacle:  # such as a GPU without Triton
        gain = None
        say(f"      not here: {obstacle}")

    result = QuickstartResult(
        model=model,
        dataset=dataset,
        before=before,
        substituted=substituted,
        after=after,
        dense_speed=dense_speed,
        sparse_speed=sparse_speed,
        skips=_skips(sparse),
        gain=gain,
        output=folder,
        seconds=time.perf_counter() - started,
    )
    (folder / "report.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    after.plot(folder / "sparsity.png", before=before)
    say(f"\nthe sparse model:  {final}    {result.seconds:.0f} seconds in all")
    say(f"sparsity by layer: {folder / 'sparsity.png'}    numbers: {folder / 'report.json'}")
    say(f"\n{result}")
    return result


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())


def _new_folder(output: str | Path | None) -> Path:
    """The folder of this run, made."""
    folder = Path(output or DEFAULT_OUTPUT).expanduser()
    if output is None:
        number = 2
        while folder.exists():
            folder = Path(f"{DEFAULT_OUTPUT}-{number}")
            number += 1
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={str(folder)!r} is there and not empty; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _load(source: str | Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _evaluation_texts(dataset: str, tokenizer: Any, tokens: int) -> list[str]:
    """Held-out documents with at least ``tokens`` tokens, or all that there are."""
    texts: list[str] = []
    count = 0
    documents = evaluation_texts(dataset, holdout=_HOLDOUT)
    while count < tokens and (chunk := list(islice(documents, 8))):
        texts += chunk
        count += sum(map(len, tokenizer(chunk, verbose=False)["input_ids"]))
    if count < 2:
        raise ValueError(f"dataset={dataset!r} has no held-out text to measure on.")
    return texts


def _decode_speeds(models: list[Any], context: int, tokens: int, repeats: int = 3) -> list[float]:
    """Greedy tokens per second at batch 1: the best of ``repeats``, the models by turns, after a warm-up."""
    tokens = min(tokens, context - 8)
    seconds = [float("inf")] * len(models)
    for turn in range(repeats + 1):
        for i, model in enumerate(models):
            # The same tokens for all, so that what the models have to say makes no difference.
            prompt = torch.arange(1, 9, device=model.device)[None]
            count = tokens if turn else 8
            begin = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[i] = min(seconds[i], time.perf_counter() - begin)
    return [tokens / s for s in seconds]


class _Operators(TorchDispatchMode):
    """Notes which of our operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hf_sparse":
            self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def _skips(model: Any) -> bool:
    """Whether the model skips silent neurons when it decodes one token, seen by letting it do so."""
    with torch.no_grad(), _Operators() as operators:
        model(torch.ones(1, 1, dtype=torch.long, device=model.device))
    return bool(operators.seen)
