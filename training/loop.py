"""The training loop: one update after another, with evaluation, logging and checkpoints in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from checkpoint import Checkpoints, Progress
from data import Batch, DataExhaustedError, TrainingData, check_bad
from evaluation import as_record
from progress_bar import ProgressBar
from recipe import Recipe
from run_log import RunLog
from speed import Speed
from stopping import STATUS, Stop, stop_on_sigterm
from torch import Tensor, nn
from training_sparsity import TrainingSparsity

from hf_sparse.adapters.roles import shape
from hf_sparse.methods import Acting, Term
from hf_sparse.metrics import SparsityReport
from hf_sparse.schedules import learning_rate_share
from hf_sparse.sharpness import Perturbation

_STOP = "stop"


@dataclass
class Run:
    """What the loop works with. ``model`` and ``optimizer`` are prepared by ``accelerator``."""

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    acting: Acting
    perturbation: Perturbation | None
    data: TrainingData
    checkpoints: Checkpoints
    log: RunLog
    evaluate: Callable[[], SparsityReport]
    sparsity: TrainingSparsity


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on weight matrices only: not on norms, biases and other vectors."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = len(shape(parameter)) >= 2 and "bias" not in name
            (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    # Fused: several times as fast on a CPU, and no temporary copies of the parameters on a GPU.
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=True)


def train(run: Run, progress: Progress) -> Progress:
    """Run from ``progress`` to the last step of the recipe.

    Raises:
        DataExhaustedError: the data ended first.
        FloatingPointError: too many updates in a row had a loss or gradient that is not finite.
        SystemExit: a process got SIGTERM; everything is saved.

    """
    recipe, accelerator = run.recipe, run.accelerator
    tokens_per_update = recipe.global_batch * recipe.raw_length
    speed = Speed(progress.tokens)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_sigterm())
        batches = stack.enter_context(closing(iter(run.data)))
        bar = stack.enter_context(
            ProgressBar(
                recipe.last_step, progress.step, shown=recipe.progress and accelerator.is_main_process
            )
        )
        run.model.train()
        if progress.step >= recipe.last_step:  # a finished run: its checkpoint is of before that
            run.acting.finish()
        while progress.step < recipe.last_step:
            step = progress.step + 1
            with speed.waiting():
                batch = _next_batch(batches, step, recipe)
            values, bad, stopped = update(run, batch, step, stop)
            progress.step, progress.tokens = step, progress.tokens + tokens_per_update
            progress.streams = batch.states
            if bad:
                progress.skipped += 1
                # A loss scale that is too large comes down by itself.
                progress.skipped_in_a_row += bad != ["gradient_norm"] or accelerator.scaler is None
                if progress.skipped_in_a_row >= recipe.max_skipped:
                    raise FloatingPointError(diagnosis(run, progress, bad))
            else:
                progress.skipped_in_a_row = 0
                for name, value in values.items():
                    progress.pending.setdefault(name, []).append(value)
            bar.step()

            last = step == recipe.last_step
            if is_logged(recipe, step):
                means = {name: math.fsum(one) / len(one) for name, one in progress.pending.items()}
                now = {"learning_rate": learning_rate(recipe, step), **run.acting.values()}
                done = {"tokens": progress.tokens, "skipped_updates": progress.skipped}
                record = {**means, **now, **done, **_seen(run, progress), **speed(progress.tokens)}
                run.log.write("train", step, record)
                bar.tell(means, record)
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


def is_logged(recipe: Recipe, step: int) -> bool:
    """Whether update ``step`` has a record in the log."""
    return step % recipe.log_every == 0 or step == recipe.last_step


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


def update(run: Run, batch: Batch, step: int, stop: Stop) -> tuple[dict[str, float], list[str], bool]:
    """One optimizer update.

    Returns the mean loss, terms and gradient norm; the names of those that are trained on and not finite; and
    whether a process was asked to stop. All are the same in all processes. If something is not finite,
    weights and optimizer stay as they are.
    """
    recipe, accelerator = run.recipe, run.accelerator
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    run.acting.before_step(step)
    means = gradients(run, batch, step, stop)
    if run.perturbation is not None:
        run.acting.before_perturbed(step)
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        with run.perturbation.perturbed(scale):
            run.optimizer.zero_grad()
            gradients(run, batch, step, stop)
    norm = accelerator.clip_grad_norm_(run.model.parameters(), recipe.clip_norm or math.inf)
    values = {name: float(mean.value) for name, mean in means.items()}
    stopped = values.pop(_STOP) > 0
    trained = {name: value for name, value in values.items() if means[name].weight}
    bad = [n for n, v in {**trained, "gradient_norm": float(norm)}.items() if not math.isfinite(v)]
    if not bad:
        run.optimizer.step()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()  # clipping has told it what was not finite
    run.optimizer.zero_grad()
    if not bad:
        run.acting.after_step(step)
    if run.perturbation is not None and (count := run.perturbation.samples_due):
        renew_mask(run, batch, step, count)
    kept = {name: value for name, value in values.items() if math.isfinite(value)}
    return {**kept, "gradient_norm": float(norm)}, bad, stopped


def gradients(run: Run, batch: Batch, step: int, stop: Stop) -> dict[str, Term]:
    """Forward and backward over all micro-batches of an update; mean loss and terms over all processes."""
    accelerator = run.accelerator
    micro_batches = _pieces(batch.inputs, run.recipe.micro_batch, accelerator.device)
    sums: dict[str, Tensor] = {}
    weights: dict[str, float] = {_STOP: 0.0}
    for i, inputs in enumerate(micro_batches):
        # Sequences count equally, in whatever pieces they come.
        weight = len(inputs["input_ids"]) / len(batch.input_ids)
        last = i == len(micro_batches) - 1
        if is_logged(run.recipe, step):
            run.sparsity.begin(step, i)
        accelerator.sync_gradients = last  # DeepSpeed updates in the backward of the last
        with nullcontext() if last else accelerator.no_sync(run.model):
            terms = backward(run, inputs, step, weight)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.value.detach().float() * weight
            weights[name] = term.weight
    sums[_STOP] = torch.tensor(float(stop.asked), device=accelerator.device)
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean").unbind()
    return {name: Term(mean, weights[name]) for name, mean in zip(sums, means, strict=True)}


def backward(run: Run, inputs: dict[str, Tensor], step: int, weight: float = 1.0) -> dict[str, Term]:
    """Forward and backward of one micro-batch, its loss times ``weight``; the loss and the terms."""
    output = run.model(**inputs, use_cache=False)
    terms = {"loss": Term(output.loss, run.acting.task_weight(step)), **run.acting.loss(step, inputs, output)}
    nothing = 0.0 * output.loss
    del output  # its logits, which backward does not need, may be the largest tensor of all
    if idle := [name for name, term in terms.items() if term.weight and not term.value.requires_grad]:
        raise RuntimeError(f"{' and '.join(idle)} would train nothing: no gradient reaches a trained weight.")
    total = sum((term.weight * term.value for term in terms.values() if term.weight), 0.0)
    total = total * weight if torch.is_tensor(total) else nothing
    if run.accelerator.distributed_type == DistributedType.DEEPSPEED:
        _require_finite(run, total, step)
    run.accelerator.backward(total)
    return terms


def _require_finite(run: Run, total: Tensor, step: int) -> None:
    """DeepSpeed updates at the end of a backward, which can then not be left out any more."""
    if (
        float(run.accelerator.reduce(total.detach().isfinite().float(), "sum"))
        < run.accelerator.num_processes
    ):
        raise FloatingPointError(
            f"the loss of step {step} is not finite, and under DeepSpeed an update cannot be left out. Go on "
            "from the last checkpoint with DDP or FSDP2, or start again with a lower learning_rate."
        )


def renew_mask(run: Run, batch: Batch, step: int, count: int) -> None:
    """Give a Fisher mask the gradients of single sequences, the first ``count`` of the global batch."""
    assert run.perturbation is not None
    per_stream = len(batch.input_ids) // len(batch.states)
    places = [stream * per_stream + i for stream in batch.states for i in range(per_stream)]
    wanted = [place < count for place in places]
    own = {name: tensor[wanted].to(run.accelerator.device) for name, tensor in batch.inputs.items()}
    run.perturbation.update_mask(lambda sample: backward(run, sample, step), own)
    run.optimizer.zero_grad()


def _pieces(inputs: dict[str, Tensor], rows: int, device: torch.device) -> list[dict[str, Tensor]]:
    columns = [tensor.to(device).split(rows) for tensor in inputs.values()]
    return [dict(zip(inputs, piece, strict=True)) for piece in zip(*columns, strict=True)]


def _next_batch(batches: Iterator[Batch], step: int, recipe: Recipe) -> Batch:
    try:
        return next(batches)
    except DataExhaustedError as error:
        raise DataExhaustedError(
            f"{error}, and the run needs more at step {step} of {recipe.last_step}. Lower max_steps to "
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
