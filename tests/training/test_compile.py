"""``compile`` trains through torch.compile: the same losses, with every hook of the methods in place."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

from support.compiler import needs_compiler
from support.many import ALL_METHODS, FIELDS, same_curves, same_model

pytestmark = [pytest.mark.slow, needs_compiler]

FIELDS = {**FIELDS, "methods": ALL_METHODS, "max_steps": 8, "eval_every": 4, "save_every": 4}


def test_a_compiled_run_gives_the_loss_curve_of_a_plain_one_and_continues(command, in_process, tmp_path):
    plain, compiled, continued = (tmp_path / name for name in ("plain", "compiled", "continued"))
    in_process(command(plain, **FIELDS))
    in_process(command(compiled, compile=True, **FIELDS))
    same_curves(plain, compiled)
    same_model(plain, compiled)
    weights = load_file(compiled / "checkpoints/step-00000008/model.safetensors")
    assert weights.keys() >= load_file(plain / "checkpoints/step-00000008/model.safetensors").keys()
    shutil.copytree(compiled, continued)
    shutil.rmtree(continued / "checkpoints/step-00000008")
    in_process(command(continued, compile=True, gradient_checkpointing=True, resume=True, **FIELDS))
    same_curves(plain, continued)
