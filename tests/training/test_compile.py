"""``compile`` trains through torch.compile: the same losses, with every hook of the methods in place."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

from support.compiler import needs_compiler
from support.many import ALL_METHODS, FIELDS, same_curves, same_model

pytestmark = [pytest.mark.slow, needs_compiler]

FIELDS = {**FIELDS, "max_steps": 6, "eval_every": 3, "save_every": 3}
WEIGHTS = "checkpoints/step-00000006/model.safetensors"


@pytest.mark.parametrize("methods", [ALL_METHODS, {"target_sparsity": {"sparsity": 0.8}}])
def test_a_compiled_run_goes_on_from_a_plain_one_as_that_does(methods, command, in_process, tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    fields = {**FIELDS, "methods": methods}
    in_process(command(plain, **fields))
    shutil.copytree(plain, compiled)
    shutil.rmtree(compiled / "checkpoints/step-00000006")
    shutil.rmtree(compiled / "final")
    in_process(command(compiled, compile=True, resume=True, **fields))
    same_curves(plain, compiled)
    same_model(plain, compiled)
    saved, expected = (load_file(run / WEIGHTS) for run in (compiled, plain))
    assert saved.keys() == expected.keys()
