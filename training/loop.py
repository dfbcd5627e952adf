"""The training loop: one update after another, with evaluation, logging and checkpoints in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from checkpoint import Checkpoints, Progress
from data import Batch, DataExhaustedError, TrainingData, check_bad
from evaluation import as_record
from progress_bar import ProgressBar
from recipe import Recipe
from run_log import RunLog
from speed import Speed
from torch import Tensor, nn
from training_sparsity import TrainingSparsity

from hf_sparse.methods import Acting, Term
from hf_sparse.metrics import SparsityReport
from hf_sparse.schedules import learning_rate_share


@dataclass
class Run:
    """What the loop works with. ``model`` and ``optimizer`` are prepared by ``accelerator``."""

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    acting: Acting
    data: TrainingData
    checkpoints: Checkpoints
    log: RunLog
    evaluate: Callable[[], SparsityReport]
    sparsity: TrainingSparsity


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on norms, biases and other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2))


def train(run: Run, progress: Progress) -> Progress:
    """Run from ``progress`` to ``recipe.max_steps``.

    Raises:
        DataExhaustedError: the data ended first.
        FloatingPointError: the loss is no longer finite.

    """
    recipe, accelerator = run.recipe, run.accelerator
    tokens_per_update = recipe.global_batch * recipe.sequence_length
    speed = Speed(progress.tokens)
    with ExitStack() as stack:
        batches = stack.enter_context(closing(iter(run.data)))
        bar = stack.enter_context(
            ProgressBar(
                recipe.max_steps, progress.step, shown=recipe.progress and accelerator.is_main_process
            )
        )
        run.model.train()
        while progress.step < recipe.max_steps:
            step = progress.step + 1
            with speed.waiting():
                batch = _next_batch(batches, step, recipe)
            values = update(run, batch, step)
            progress.step, progress.tokens = step, progress.tokens + tokens_per_update
            progress.streams = batch.states
            for name, value in values.items():
                progress.pending.setdefault(name, []).append(value)
            bar.step()

            last = step == recipe.max_steps
            if is_logged(recipe, step):
                means = _settle(progress)
                now = {"learning_rate": learning_rate(recipe, step), **run.acting.values()}
                extra = {**now, "tokens": progress.tokens, **_seen(run, progress)}
                record = {**means, **extra, **speed(progress.tokens)}
                run.log.write("train", step, record)
                bar.tell(means, record)
                progress.pending = {}
            if last or (recipe.eval_every and step % recipe.eval_every == 0):
                with speed.paused():
                    found = run.evaluate()
                run.acting.after_evaluation(step, found)
                run.log.write("eval", step, as_record(found))
                if accelerator.is_main_process:
                    bar.write(
                        f"step {step}: held-out loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, "
                        f"sparsity {found.sparsity:.1%}"
                    )
            if last or step % recipe.save_every == 0:
                with speed.paused():
                    _settle(progress)
                    progress.methods = run.acting.state_dict()
                    run.checkpoints.save(progress, recipe.to_dict())
    return progress


def is_logged(recipe: Recipe, step: int) -> bool:
    """Whether update ``step`` has a record in the log."""
    return step % recipe.log_every == 0 or step == recipe.max_steps


def learning_rate(recipe: Recipe, step: int) -> float:
    """That of update ``step`` (from 1)."""
    share = learning_rate_share(
        step,
        recipe.max_steps,
        warmup=round(recipe.warmup * recipe.max_steps),
        decay=recipe.decay,
        final=recipe.final_learning_rate,
    )
    return recipe.learning_rate * share


def update(run: Run, batch: Batch, step: int) -> dict[str, Tensor]:
    """One optimizer update; returns the mean loss, terms and gradient norm over all processes."""
    recipe, accelerator = run.recipe, run.accelerator
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    run.acting.before_step(step)
    values = gradients(run, batch, step)
    norm = accelerator.clip_grad_norm_(run.model.parameters(), recipe.clip_norm or math.inf)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.acting.after_step(step)
    return {**values, "gradient_norm": torch.as_tensor(norm)}


def gradients(run: Run, batch: Batch, step: int) -> dict[str, Tensor]:
    """Forward and backward over all micro-batches of an update; mean loss and terms over all processes."""
    accelerator = run.accelerator
    micro_batches = batch.input_ids.to(accelerator.device).split(run.recipe.micro_batch)
    task = run.acting.task_weight(step)
    sums: dict[str, Tensor] = {}
    for i, ids in enumerate(micro_batches):
        # Sequences count equally, in whatever pieces they come.
        weight = len(ids) / len(batch.input_ids)
        last = i == len(micro_batches) - 1
        inputs = {"input_ids": ids, "labels": ids}
        if is_logged(run.recipe, step):
            run.sparsity.begin(step, i)
        with nullcontext() if last else accelerator.no_sync(run.model):
            output = run.model(**inputs, use_cache=False)
            terms = {"loss": Term(output.loss, task), **run.acting.loss(step, inputs, output)}
            total = sum((term.weight * term.value for term in terms.values() if term.weight), 0.0)
            accelerator.backward(total * weight if torch.is_tensor(total) else 0.0 * output.loss)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.value.detach().float() * weight
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean").unbind()
    return dict(zip(sums, means, strict=True))


def _next_batch(batches: Iterator[Batch], step: int, recipe: Recipe) -> Batch:
    try:
        return next(batches)
    except DataExhaustedError as error:
        raise DataExhaustedError(
            f"{error}, and the run needs more at step {step} of {recipe.max_steps}. Lower max_steps to "
            f"{step - 1} or less, raise these epochs to go over the data again, or add data."
        ) from None


def _seen(run: Run, progress: Progress) -> dict[str, Any]:
    """What the log record of an update says of activations and documents, over all processes.

    Raises:
        ValueError: more documents than allowed cannot be used.

    """

    def total(own: Tensor) -> Tensor:
        return run.accelerator.reduce(own.to(run.accelerator.device), "sum")

    bad = int(total(torch.tensor([sum(state.all_bad for state in progress.streams.values())])))
    check_bad(bad, run.recipe)
    return {"bad_documents": bad, **run.sparsity.result(total)}


def _settle(progress: Progress) -> dict[str, float]:
    """Bring the pending values to Python, and give their means.

    Raises:
        FloatingPointError: one is not finite.

    """
    progress.pending = {k: [float(value) for value in values] for k, values in progress.pending.items()}
    means = {name: math.fsum(values) / len(values) for name, values in progress.pending.items()}
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"{name} is {mean} at or before step {progress.step}: training has diverged. "
                "Start again in a new output_dir with a lower learning_rate, clip_norm or penalty."
            )
    return means
