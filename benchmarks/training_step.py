"""What an update costs: the trainer of this project against transformers.Trainer, in turns.

    python benchmarks/training_step.py --model DIR        # a folder that transformers can load
    python benchmarks/training_step.py                    # the shape of SmolLM2-135M, random weights
    python benchmarks/training_step.py --batch 8 --micro-batch 2 --length 512

Each competitor is a process of its own, with the same model, batches and optimizer settings (AdamW, clipped,
decay on matrices); they make one update after the other, so only one works at a time. The time of an update
is from the end of the one before to its own, with batch, schedule and log. ``finetune.py`` is the whole
program: it reads, shuffles and tokenises text meanwhile, and then gets the batch that all have; the Trainer
has its tokens at hand. Memory is the peak of the process in RAM, or on a GPU what torch allocated there. That
in RAM is of updates of its own, of each alone and after the times, with an allocator that gives large buffers
back: else it is that of what was freed and not reused as well, and varies by several per cent.
Before any timing, competitors that are to train alike have to have the same loss after the first update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus

L1 = {"l1": {"boundaries": [1.0], "targets": [0.1]}}
THEIRS, OURS = "transformers.Trainer", "finetune.py"
COMPETITORS: dict[str, tuple[str, dict[str, Any]]] = {
    THEIRS: (THEIRS, {}),
    OURS: (OURS, {}),
    f"{THEIRS}, ReLU and L1": (THEIRS, L1),
    f"{OURS}, ReLU and L1": (OURS, L1),
}
RATE, DECAY, BETAS, CLIP, LOG_EVERY = 1e-4, 0.1, (0.9, 0.95), 1.0, 10
STEPS = 1_000_000  # of the schedules; a run ends with its turns


def main() -> None:
    parser = harness.parser(__doc__, repeats=9)
    parser.add_argument("--model", type=Path, help="folder of a model; default: random weights")
    parser.add_argument("--text", type=Path, help="folder of text; default: the documentation of Python")
    parser.add_argument("--batch", type=int, default=8, help="sequences in an update")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences in a forward")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument(
        "--competitors", nargs="+", choices=COMPETITORS, default=list(COMPETITORS), metavar="NAME",
        help=f"the first is what others are compared with; default: {', '.join(COMPETITORS)}",
    )  # fmt: skip
    parser.add_argument("--only", choices=COMPETITORS, help=argparse.SUPPRESS)  # be that one
    args = parser.parse_args()
    if args.only:
        work(args)
        return
    conditions = harness.begin(args)
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or random_model(Path(folder) / "random")
        args.text = args.text or python_corpus().write(Path(folder) / "text")
        rows = compare(args)
    print(harness.table([cells(row) for row in rows]))
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def random_model(folder: Path) -> Path:
    """Of the shape of SmolLM2-135M, with the tokenizer of the embedded model."""
    LlamaForCausalLM(harness.smollm2()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
    return folder


# ---- the processes


class Competitor:
    """The process of one, as the comparison sees it."""

    def __init__(self, name: str, args: argparse.Namespace, **environment: str) -> None:
        options = {"model": args.model, "batch": args.batch, "micro-batch": args.micro_batch}
        options |= {"length": args.length, "device": args.device, "text": args.text}
        options["threads"] = torch.get_num_threads()
        command = [sys.executable, __file__, "--only", name]
        command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.mib = 0.0
        self.loss = 0.0

    def seconds(self) -> float:
        """Of one update, which it makes now.

        Raises:
            SystemExit: it has failed.

        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write("\n")
            stdin.flush()
            told = json.loads(stdout.readline())
        except (OSError, ValueError):
            raise SystemExit(f"a competitor failed:\n{self._process.communicate()[1][-3000:]}") from None
        self.mib, self.loss = told["mib"], told["loss"]
        return float(told["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Turns:
    """The other end: one update whenever it is asked for."""

    def __init__(self, device: str) -> None:
        self._device, self._begin = device, 0.0
        self._out, sys.stdout = sys.stdout, sys.stderr  # others may have something to say
        self._loss: float | None = None

    def wait(self) -> None:
        """Until the next one is wanted.

        Raises:
            SystemExit: none is.

        """
        if not sys.stdin.readline():
            sys.exit()
        self._begin = time.perf_counter()

    def end(self, loss: Callable[[], float]) -> None:
        """Tell what the update took and, always that of the first, the loss after it; wait for the next."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            mib = torch.cuda.max_memory_allocated() / 2**20
        else:
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        seconds = time.perf_counter() - self._begin
        self._loss = loss() if self._loss is None else self._loss
        print(json.dumps({"seconds": seconds, "mib": mib, "loss": self._loss}), file=self._out, flush=True)
        self.wait()


def work(args: argparse.Namespace) -> None:
    """Be the competitor ``args.only``, until there are no more turns."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    trainer, methods = COMPETITORS[args.only]
    with tempfile.TemporaryDirectory() as folder:
        (theirs if trainer == THEIRS else ours)(methods, args, Path(folder))


def batches(model: Any, args: argparse.Namespace) -> Iterator[Tensor]:
    """Without end, int64 ``[batch, length]``, the same for all."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(1, model.config.vocab_size, (args.batch, args.length), generator=generator)


@torch.no_grad()
def held_out_loss(model: Any, args: argparse.Namespace) -> float:
    """On the first micro-batch, in evaluation mode."""
    ids = next(batches(model, args))[: args.micro_batch].to(args.device)
    loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    model.train()
    return float(loss)


def theirs(methods: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    turns = Turns(args.device)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if methods:
        hf_sparse.patch(model, "relu")

    class Data(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for ids in batches(model, args):
                yield from ({"input_ids": row, "labels": row} for row in ids)

    class Told(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(lambda: held_out_loss(model, args))

    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.batch // args.micro_batch,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to=[],
        use_cpu=args.device == "cpu",
    )
    callbacks: list[TrainerCallback] = [hf_sparse.SparsityCallback(methods)] if methods else []
    Trainer(model, arguments, train_dataset=Data(), callbacks=[*callbacks, Told()]).train()


def ours(methods: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
    import finetune
    import loop

    turns = Turns(args.device)
    update = loop.update
    tokens: list[Iterator[Tensor]] = []

    def told(run: Any, batch: Any, *more: Any) -> Any:
        model = run.accelerator.unwrap_model(run.model)
        if not tokens:
            tokens.append(batches(model, args))
            turns.wait()
        ids = next(tokens[0])
        values = update(run, replace(batch, input_ids=ids, labels=ids), *more)
        turns.end(lambda: held_out_loss(model, args))
        return values

    loop.update = told
    options = {
        "model": args.model,
        "dataset": args.text,
        "output-dir": folder,
        "patch": "relu" if methods else "none",
        "methods": json.dumps(methods),
        "max-steps": STEPS,
        "epochs": STEPS,
        "data-streams": 1,
        "global-batch": args.batch,
        "micro-batch": args.micro_batch,
        "sequence-length": args.length,
        "learning-rate": RATE,
        "warmup": 0,
        "decay": "constant",
        "weight-decay": DECAY,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "clip-norm": CLIP,
        "log-every": LOG_EVERY,
        "eval-every": 0,
        "eval-tokens": args.length,
        "save-every": STEPS,
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    finetune.main([*arguments, "--no-tensorboard"])


# ---- the comparison


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each competitor.

    Raises:
        SystemExit: one failed, or does not train as another does.

    """
    competitors = {name: Competitor(name, args) for name in args.competitors}
    try:
        for one in competitors.values():  # a first update, of all before the turns begin
            one.seconds()
        losses = {name: one.loss for name, one in competitors.items()}
        for name, other in itertools.combinations(losses, 2):
            alike = COMPETITORS[name][1] == COMPETITORS[other][1]
            if alike and abs(losses[name] - losses[other]) > 1e-4 * losses[name]:
                raise SystemExit(f"wrong result, no timing: losses after one update differ: {losses}")
        runs: Any = competitors
        times, ratios = harness.interleaved(runs, args.repeats)
        mib = {name: one.mib for name, one in competitors.items()}
    finally:
        for one in competitors.values():
            one.close()
    if args.device == "cpu":
        mib = {name: peak(name, args) for name in competitors}
    return [
        {
            "trainer": name,
            "update": times[name],
            "share_of_the_first": 1 / ratios[name].median,
            "share_quartiles": [1 / ratios[name].high, 1 / ratios[name].low],
            "peak_mib": mib[name],
            "memory_share_of_the_first": mib[name] / mib[args.competitors[0]],
            "loss_after_one_update": losses[name],
            "batch": args.batch,
            "micro_batch": args.micro_batch,
            "length": args.length,
            "model": args.model.name if args.model.name else "random",
        }
        for name in competitors
    ]


def peak(name: str, args: argparse.Namespace) -> float:
    """MiB of RAM that a competitor has in use at most, of all but small buffers."""
    one = Competitor(name, args, MALLOC_MMAP_THRESHOLD_="65536")
    try:
        for _ in range(3):  # the first makes the state of the optimizer
            one.seconds()
    finally:
        one.close()
    return one.mib


def cells(row: dict[str, Any]) -> dict[str, str]:
    update, (low, high) = row["update"], row["share_quartiles"]
    return {
        "trainer": row["trainer"],
        "seconds": f"{update.median_ms / 1e3:.3f}",
        "of the first": f"{row['share_of_the_first']:.1%}",
        "quartiles": f"{low:.1%} to {high:.1%}",
        "MiB": f"{row['peak_mib']:.0f}",
        "of the first ": f"{row['memory_share_of_the_first']:.1%}",
    }


if __name__ == "__main__":
    main()
