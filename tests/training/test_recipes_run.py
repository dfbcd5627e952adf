"""Every shipped recipe runs, with nothing but a model, a data set and a length given."""

from __future__ import annotations

import math

import pytest
from run_log import read_log
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from support.runs import TRAINING

RECIPES = sorted(path.stem for path in (TRAINING / "recipes").glob("*.yaml"))
SMALLER = {"sequence_length": 16, "global_batch": 16, "eval_tokens": 64}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_a_tiny_model(name, tiny, tiny_t5, texts, in_process, tmp_path) -> None:
    is_t5 = name == "t5_scratch"
    given = {
        "model": tiny_t5 if is_t5 else tiny,
        "dataset": texts,
        "max_steps": 4,
        "output_dir": tmp_path,
        **SMALLER,
    }
    options = [word for field, value in given.items() for word in (f"--{field}", str(value))]
    recipe = ["--config", str(TRAINING / "recipes" / f"{name}.yaml")]
    in_process(["", "", *recipe, *options, "--no-progress", "--no-tensorboard"])
    last = [record for record in read_log(tmp_path / "log.jsonl") if record["kind"] == "eval"][-1]
    assert last["step"] == 4
    assert math.isfinite(last["loss"])
    (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(tmp_path / "final")
