"""Every shipped recipe runs, given only model, data set and length, and goes on when it was killed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from run_log import read_log
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from support.resumed import same_result
from support.runs import TRAINING

RECIPES = sorted(path.stem for path in (TRAINING / "recipes").glob("*.yaml"))
SMALLER = {"sequence_length": 16, "global_batch": 16, "eval_tokens": 64}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_goes_on_to_the_same_bits(name, tiny, tiny_t5, texts, in_process, tmp_path) -> None:
    is_t5 = name == "t5_scratch"
    given = {
        "model": tiny_t5 if is_t5 else tiny,
        "dataset": texts,
        "max_steps": 4,
        "save_every": 2,
        **SMALLER,
    }
    options = [word for field, value in given.items() for word in (f"--{field}", str(value))]
    recipe = ["--config", str(TRAINING / "recipes" / f"{name}.yaml")]

    def run(output: Path) -> None:
        flags = ["--resume", "--no-progress", "--no-tensorboard", "--output_dir", str(output)]
        in_process(["", "", *recipe, *options, *flags])

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    last = [record for record in read_log(whole / "log.jsonl") if record["kind"] == "eval"][-1]
    assert last["step"] == 4
    assert math.isfinite(last["loss"])
    (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(whole / "final")

    # What a run leaves that is killed in its last update.
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("final", "step-00000004"))
    assert [one.name for one in (killed / "checkpoints").iterdir()] == ["step-00000002"]
    run(killed)
    same_result(killed, whole)
