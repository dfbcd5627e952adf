"""Score a model with lm-evaluation-harness on a task of your own: dense, and calibrated with the kernels on.

    pip install lm-eval
    python examples/lm_eval_local_task.py
    python examples/lm_eval_local_task.py --model ./model --text notes.txt

By default the embedded model on Python's documentation. The task, written into a folder as the harness wants
it, is to tell how a paragraph goes on: its own second half, or that of another one. Nothing is downloaded.
The model is whatever ``from_pretrained`` gives, so a patched or calibrated checkpoint is loaded as such.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus

TASK = """\
task: goes_on
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
"""


def write_task(paragraphs: list[str], folder: Path) -> None:
    """The task ``goes_on`` of paragraphs of 12 words and more, for a ``TaskManager``."""
    halves = []
    for paragraph in paragraphs:
        words = paragraph.split()[:40]
        if len(words) >= 12:
            halves.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
    rows = [
        {"begin": begin, "right": right, "wrong": wrong} for (begin, right), (_, wrong) in pairwise(halves)
    ]
    path = folder / "goes_on.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "goes_on.yaml").write_text(TASK.format(rows=path), encoding="utf-8")


def accuracy(model: Any, tokenizer: Any, folder: Path) -> float:
    """The share of paragraphs whose own second half is the likelier one."""
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=harness, tasks=["goes_on"], task_manager=tasks, bootstrap_iters=0)
    return float(found["results"]["goes_on"]["acc,none"])


def main() -> None:
    """Score dense, calibrate, score again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub id")
    parser.add_argument("--text", type=Path, help="of the task; paragraphs are separated by empty lines")
    parser.add_argument("--sparsity", type=float, default=0.3, help="of the calibration (TEAL)")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    corpus = python_corpus()
    texts = corpus.held_out if args.text is None else [args.text.read_text(encoding="utf-8")]
    paragraphs = [one for text in texts for one in text.split("\n\n")][:100]
    with tempfile.TemporaryDirectory() as folder:
        write_task(paragraphs, Path(folder))
        dense = accuracy(model, tokenizer, Path(folder))
        report = hf_sparse.calibrate(
            model, corpus.train[:40], tokenizer=tokenizer, target_sparsity=args.sparsity, sequence_length=128
        )
        # The task's calls have many tokens, for which a machine may not find skipping worth it: ask for it.
        with hf_sparse.backend("cpp" if model.device.type == "cpu" else "triton"):
            skipping = accuracy(model, tokenizer, Path(folder))
    print(report)
    print(f"accuracy: dense {dense:.1%}, calibrated and skipping {skipping:.1%}")


if __name__ == "__main__":
    main()
