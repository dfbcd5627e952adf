"""Finetune a pretrained model for activation sparsity. `python training/finetune.py --help` lists the fields.

Start it as one process (`python training/finetune.py …`) or several (`accelerate launch …`): the order of the
data is the same, and the result up to rounding. docs/training.md is the manual.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The tokenizer runs in a background thread of every process; its own threads stay on.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import parse_recipe
from checkpoint import CheckpointError, Checkpoints, Progress, read_state, written_whole
from data import DataExhaustedError, TrainingData, evaluation_data, open_documents
from evaluation import LATEST, ORIGINAL, as_record, evaluate, keep, kept
from final_card import write_final_card
from final_report import write_report
from loading import load
from loop import Run, build_optimizer, train
from lora import add_lora
from recipe import Recipe
from run_log import RunLog, read_log
from sharding import fit, is_sharded, reads_no_weights, size, whole_in_every_process, whole_state
from task import Task
from trackers import begin_tracking, installed
from training_sparsity import TrainingSparsity
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse.methods import ActingTogether, Training
from hf_sparse.metrics import SparsityReport
from hf_sparse.patch_report import in_words
from hf_sparse.surroundings import machine, versions
from hf_sparse.windows import context_length
from triton_ops.table import table


def main(argv: Sequence[str] | None = None) -> None:
    """Run a recipe from its beginning, or from its last checkpoint, to its end."""
    recipe = parse_recipe(argv)
    precision = "no" if recipe.precision == "fp32" else recipe.precision
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=installed(recipe.trackers) or None,
        dynamo_backend="inductor" if recipe.compile else None,
    )
    output = Path(recipe.output_dir).expanduser()
    say = accelerator.print
    if not (recipe.progress and accelerator.is_main_process):
        disable_progress_bar()

    if recipe.precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would compute in float32
        raise ValueError("precision='fp16' needs a GPU; on a CPU choose bf16 or fp32.")
    fit(accelerator, recipe)

    # Continue, or begin?
    checkpoints = Checkpoints(accelerator, output / "checkpoints", recipe.keep_checkpoints)
    checkpoint = find_checkpoint(recipe, checkpoints)
    say(f"continuing from {checkpoint}" if checkpoint else f"a new run in {output}")

    # The model, before anything is changed.
    set_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model, revision=recipe.revision or "main")
    # Later a PeftModel, with lora, and whatever accelerate makes of it.
    model: Any = load(recipe, empty=reads_no_weights(accelerator))
    check_length(recipe, model)

    # The text: what to evaluate on, and therefore not to train on.
    source = open_documents(recipe)
    held_out_sequences, held_out = evaluation_data(recipe, source, tokenizer)
    if len(held_out_sequences) < accelerator.num_processes:
        raise ValueError(
            f"eval_tokens={recipe.eval_tokens} gives {len(held_out_sequences)} sequences to evaluate, fewer "
            f"than the {accelerator.num_processes} processes; raise it, or add held-out text."
        )
    say(f"evaluation on {held_out_sequences.numel():,} held-out tokens")
    to_evaluate = Task(recipe, tokenizer).held_out(held_out_sequences)

    def evaluation(of: torch.nn.Module, file: str = LATEST) -> SparsityReport:
        report = evaluate(accelerator, of, to_evaluate, batch_size=recipe.micro_batch)
        if accelerator.is_main_process:
            keep(report, output / file)
        return report

    done = read_state(checkpoint)["step"] if checkpoint else None
    dense_loss = recorded_loss(output / "log.jsonl") if checkpoint else None
    about = describe(recipe, accelerator, model)
    log = RunLog(
        output,
        main=accelerator.is_main_process,
        tensorboard=recipe.tensorboard,
        after_step=done,
        track=begin_tracking(accelerator, output, about, continues=checkpoint is not None),
    )
    if not checkpoint:
        log.write("run", 0, about)
        if accelerator.is_main_process:
            (output / ORIGINAL).unlink(missing_ok=True)  # of a run before
        if not is_sharded(accelerator):  # a sharded model may not fit one device as a whole
            model.to(accelerator.device)
            with accelerator.autocast():
                original = evaluation(model, ORIGINAL)
            dense_loss = None if hf_sparse.inspect(model).patched else original.loss
            log.write("original", 0, as_record(original))
            say(f"original model: perplexity {original.perplexity:.2f}, sparsity {original.sparsity:.1%}")

    # The change: another activation, in place. The dense baseline stays as it is.
    if (config := recipe.sparsity_config()) is not None:
        if (old := hf_sparse.inspect(model).config) is not None:
            say(f"{recipe.model} is patched already, with {in_words(old)}; patch= replaces that")
        say(hf_sparse.patch(model, config))
    elif hf_sparse.inspect(model).patched:
        raise ValueError(
            f"patch={recipe.patch!r} is the dense baseline, but {recipe.model!r} is patched already: say "
            "what it is to be patched with, or start from the dense model."
        )
    if (lora := recipe.adapters()) is not None:
        model = add_lora(model, lora)

    # What acts during training.
    setting = Training(
        model,
        recipe.max_steps,
        mean=lambda value: accelerator.reduce(value, "mean"),
        dense=lambda: dense(recipe, accelerator).to(accelerator.device).eval(),
        dense_loss=None if recipe.from_scratch else dense_loss,
        eval_every=recipe.eval_every,
    )
    acting = ActingTogether(recipe.acting_methods(), setting)
    sparsity = TrainingSparsity(model, compiled=recipe.compile)
    if recipe.skip_in_training:
        skipping = hf_sparse.skip_in_training(model, recipe.skip_in_training)
        say(f"{skipping} MLP blocks skip in training where at most {recipe.skip_in_training:.0%} is active")
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, build_optimizer(recipe, model))
    sharpness = recipe.perturbation()
    perturbation = sharpness.build(optimizer, model, recipe.max_steps) if sharpness else None
    progress = Progress()
    set_seed(recipe.seed, device_specific=True)  # dropout differs between processes
    if checkpoint:
        progress = checkpoints.load(checkpoint)
        acting.load_state_dict(progress.methods)
        if perturbation:
            perturbation.load(checkpoint / "sharpness.safetensors")
    else:
        first = evaluation(model)
        acting.after_evaluation(0, first)
        log.write("eval", 0, as_record(first))
        say(f"before training: perplexity {first.perplexity:.2f}, sparsity {first.sparsity:.1%}")

    # Training.
    data = TrainingData(
        recipe,
        source,
        tokenizer,
        held_out,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        states=progress.streams,
    )
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        acting=acting,
        perturbation=perturbation,
        data=data,
        checkpoints=checkpoints,
        log=log,
        evaluate=lambda: evaluation(model),
        sparsity=sparsity,
    )
    if perturbation:
        checkpoints.also(lambda folder: perturbation.save(folder / "sharpness.safetensors"))
    train(run, progress)

    # The result.
    sparsity.detach()
    acting.detach()
    patched = hf_sparse.inspect(accelerator.unwrap_model(model, keep_torch_compile=False)).config
    became = None if patched is None else in_words(patched)
    save_final(accelerator, model, tokenizer, recipe, output)
    log.close()
    if accelerator.is_main_process:
        say(summary(output))
        say(f"the report is {write_report(output, recipe.to_dict(), became)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def dense(recipe: Recipe, accelerator: Accelerator) -> PreTrainedModel:
    """The model before the patch, to learn from: whole in every process, however that one is sharded.

    Raises:
        ValueError: it has random weights.

    """
    if recipe.from_scratch:
        raise ValueError(
            f"with from_scratch there is no dense model to learn from: leave {', '.join(recipe.methods)} out."
        )
    with whole_in_every_process(accelerator):
        return load(recipe)


def find_checkpoint(recipe: Recipe, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to continue from, None for a new run.

    Raises:
        CheckpointError: output_dir holds a run that is not to be resumed, or one of another recipe.

    """
    if not recipe.resume:
        if checkpoints.exists():
            raise CheckpointError(
                f"output_dir={recipe.output_dir!r} holds the checkpoints of a run: continue it with "
                "--resume, or choose another output_dir."
            )
        return None
    path = checkpoints.newest()
    if path and (changed := recipe.changed(read_state(path)["recipe"])):
        mend = "Set them back, or start a new run in another output_dir."
        if any(change.startswith("max_steps:") for change in changed):
            mend += " All schedules hang on max_steps; extra_steps goes on after it with what they end with."
        raise CheckpointError(f"{path} belongs to another run. Changed: {'; '.join(changed)}. {mend}")
    return path


def check_length(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        ValueError: sequence_length is too large.

    """
    limit = context_length(model)
    if limit and recipe.sequence_length > limit:
        raise ValueError(
            f"sequence_length={recipe.sequence_length} is more than the {limit} positions of "
            f"{recipe.model!r}; use at most {limit}."
        )


def recorded_loss(log: Path) -> float | None:
    """The loss of the original model, as the log of an earlier part of the run has it."""
    return next((record["loss"] for record in read_log(log) if record["kind"] == "original"), None)


def describe(recipe: Recipe, accelerator: Accelerator, model: PreTrainedModel) -> dict[str, object]:
    """The first record of a log: what is run, and on what."""
    return {
        "recipe": recipe.to_dict(),
        "architecture": type(model).__name__,
        "parameters": size(model),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device.type),
        "versions": versions(),
        "machine": machine(),
    }


def save_final(
    accelerator: Accelerator,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    output: Path,
) -> None:
    """Write the trained model, adapters merged, and its tokenizer to ``output/final``, as a whole."""
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    if is_adapted := hasattr(bare, "merge_and_unload"):
        bare = bare.merge_and_unload()
    state = None if is_adapted else whole_state(accelerator, model)
    if accelerator.is_main_process:
        with written_whole(output / "final") as (aside, final):
            # Saving takes tied weights out of the mapping that it gets.
            bare.save_pretrained(aside, state_dict=None if state is None else dict(state))
            tokenizer.save_pretrained(aside)
            write_final_card(
                aside,
                final,
                bare,
                state or bare.state_dict(),
                tokenizer,
                recipe,
                report=kept(output / LATEST),
                before=kept(output / ORIGINAL),
            )
    accelerator.wait_for_everyone()


def summary(output: Path) -> str:
    """The evaluations of a finished run, as a few lines."""
    names = {"original": "original model", "eval": "step"}
    rows = [("", "perplexity", "sparsity")]
    for record in read_log(output / "log.jsonl"):
        if record["kind"] in names:
            name = names[record["kind"]] + (f" {record['step']}" if record["kind"] == "eval" else "")
            rows.append((name, f"{record['perplexity']:.2f}", f"{record['sparsity']:.1%}"))
    return f"{table(rows)}\nthe model is in {output / 'final'}"


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DataExhaustedError, FloatingPointError, ValueError, OSError) as mistake:
        if os.environ.get("HF_SPARSE_DEBUG"):
            raise
        sys.exit(f"error: {mistake}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --resume continues from the last checkpoint")
