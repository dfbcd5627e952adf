"""The training loop: one update after another, with evaluation, logging and checkpoints in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from checkpoint import Checkpoints, Progress
from data import Batch, DataExhaustedError, TrainingData
from evaluation import as_record
from recipe import Recipe
from run_log import RunLog
from stopping import STATUS, Stop, stop_on_sigterm
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_sparse.methods import Acting, Term
from hf_sparse.metrics import SparsityReport
from hf_sparse.schedules import learning_rate_share

_STOP = "stop"


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


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on weight matrices only: not on norms, biases and other vectors."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and "bias" not in name else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2))


def train(run: Run, progress: Progress) -> Progress:
    """Run from ``progress`` to the last step of the recipe.

    Raises:
        DataExhaustedError: the data ended first.
        FloatingPointError: too many updates in a row had a loss or gradient that is not finite.
        SystemExit: a process got SIGTERM; everything is saved.

    """
    recipe, accelerator = run.recipe, run.accelerator
    tokens_per_update = recipe.global_batch * recipe.sequence_length
    speed = _Speed(progress.tokens)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_sigterm())
        batches = stack.enter_context(closing(iter(run.data)))
        bar = stack.enter_context(
            tqdm(
                total=recipe.last_step,
                initial=progress.step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                disable=not (recipe.progress and accelerator.is_main_process),
            )
        )
        run.model.train()
        if progress.step >= recipe.last_step:  # a finished run: its checkpoint is of before that
            run.acting.finish()
        while progress.step < recipe.last_step:
            step = progress.step + 1
            batch = _next_batch(batches, step, recipe)
            values, stopped = update(run, batch, step, stop)
            progress.step, progress.tokens = step, progress.tokens + tokens_per_update
            progress.streams = batch.states
            if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                progress.skipped, progress.skipped_in_a_row = (
                    progress.skipped + 1,
                    progress.skipped_in_a_row + 1,
                )
                if progress.skipped_in_a_row >= recipe.max_skipped:
                    raise FloatingPointError(diagnosis(run, progress, bad))
            else:
                progress.skipped_in_a_row = 0
                for name, value in values.items():
                    progress.pending.setdefault(name, []).append(value)
            bar.update()

            last = step == recipe.last_step
            if step % recipe.log_every == 0 or last:
                means = {name: math.fsum(one) / len(one) for name, one in progress.pending.items()}
                now = {"learning_rate": learning_rate(recipe, step), **run.acting.values()}
                done = {"tokens": progress.tokens, "skipped_updates": progress.skipped}
                record = {**means, **now, **done, "tokens_per_second": speed(progress.tokens)}
                run.log.write("train", step, record)
                bar.set_postfix(loss=f"{means.get('loss', math.nan):.3f}", refresh=False)
                progress.pending = {}
            if last:
                run.acting.finish()
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
            if last or stopped or step % recipe.save_every == 0:
                with speed.paused():
                    progress.methods = run.acting.state_dict()
                    run.checkpoints.save(progress, recipe.to_dict())
            if stopped and not last:
                if accelerator.is_main_process:
                    bar.write(
                        f"stopped by SIGTERM after step {step}; everything is saved, go on with --resume"
                    )
                raise SystemExit(STATUS)
    return progress


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


def update(run: Run, batch: Batch, step: int, stop: Stop) -> tuple[dict[str, float], bool]:
    """One optimizer update; the mean loss, terms and gradient norm, and whether a process was asked to stop.

    All are the same in all processes. If a number is not finite, weights and optimizer stay as they are.
    """
    recipe, accelerator = run.recipe, run.accelerator
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    run.acting.before_step(step)
    means = gradients(run, batch, step, stop)
    norm = accelerator.clip_grad_norm_(run.model.parameters(), recipe.clip_norm or math.inf)
    values = {name: float(mean) for name, mean in means.items()} | {"gradient_norm": float(norm)}
    stopped = values.pop(_STOP) > 0
    finite = all(map(math.isfinite, values.values()))
    if finite or accelerator.scaler is not None:  # which skips the update itself, and lowers its scale
        run.optimizer.step()
    run.optimizer.zero_grad()
    if finite:
        run.acting.after_step(step)
    return values, stopped


def gradients(run: Run, batch: Batch, step: int, stop: Stop) -> dict[str, Tensor]:
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
        with nullcontext() if last else accelerator.no_sync(run.model):
            output = run.model(**inputs, use_cache=False)
            terms = {"loss": Term(output.loss, task), **run.acting.loss(step, inputs, output)}
            total = sum((term.weight * term.value for term in terms.values() if term.weight), 0.0)
            accelerator.backward(total * weight if torch.is_tensor(total) else 0.0 * output.loss)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.value.detach().float() * weight
    sums[_STOP] = torch.tensor(float(stop.asked), device=accelerator.device)
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean").unbind()
    return dict(zip(sums, means, strict=True))


def _next_batch(batches: Iterator[Batch], step: int, recipe: Recipe) -> Batch:
    try:
        return next(batches)
    except DataExhaustedError as error:
        raise DataExhaustedError(
            f"{error}, and the run needs more at step {step} of {recipe.last_step}. Lower max_steps to "
            f"{step - 1} or less, set epochs above {recipe.epochs} to go over the data again, or add data."
        ) from None


def diagnosis(run: Run, progress: Progress, bad: list[str]) -> str:
    """What is known of a run whose updates are not finite any more."""
    weights = [
        name for name, weight in run.model.named_parameters() if not torch.isfinite(weight.detach()).all()
    ]
    where = f"weights that are not finite: {', '.join(weights[:3])}" if weights else "all weights are finite"
    rate = learning_rate(run.recipe, progress.step)
    return (
        f"training has diverged: {' and '.join(bad)} not finite in {progress.skipped_in_a_row} updates in a "
        f"row, up to step {progress.step}, at learning rate {rate:.3g}; {where}. Start again in a new "
        "output_dir with a lower learning_rate, clip_norm or penalty."
    )


class _Speed:
    """Tokens per second since the last call, without pauses."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._since, self._pause = tokens, time.perf_counter(), 0.0

    def __call__(self, tokens: int) -> float:
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._since - self._pause, 1e-9)
        self._tokens, self._since, self._pause = tokens, now, 0.0
        return round(rate, 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._pause += time.perf_counter() - begin
