"""finetune.py where each process holds a part of the model: accelerate's FSDP2 and DeepSpeed's ZeRO-3.

The ready configurations start it, on processes of the CPU instead of GPUs.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint import CheckpointError
from transformers import AutoModelForCausalLM

import hf_sparse
from support.many import ALL_METHODS, FIELDS, launched, same_curves, same_model
from support.runs import run, run_on_two

FIELDS = {**FIELDS, "max_steps": 8, "eval_every": 4, "save_every": 4}
ALL = {**FIELDS, "methods": ALL_METHODS}

pytestmark = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")


def continued(ended: Path, output: Path) -> Path:
    """A copy of a run that goes on from its middle checkpoint."""
    shutil.copytree(ended, output)
    shutil.rmtree(output / "checkpoints/step-00000008")
    return output


@pytest.fixture(scope="module")
def one(command, in_process, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    in_process(command(output, **ALL))
    return output


@pytest.fixture(scope="module")
def fsdp(command, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("fsdp") / "run"
    run(launched(command(output, gradient_checkpointing=True, **ALL), "eight_gpus_fsdp", 2))
    return output


def test_fsdp2_gives_the_loss_curve_of_one_process_and_its_model(one, fsdp):
    same_curves(one, fsdp)
    same_model(one, fsdp)
    model = AutoModelForCausalLM.from_pretrained(fsdp / "final")
    assert hf_sparse.inspect(model).config == hf_sparse.SparsityConfig.from_dict(FIELDS["patch"])


def test_an_fsdp2_run_of_two_processes_continues_in_four(one, fsdp, command, tmp_path):
    output = continued(fsdp, tmp_path / "continued")
    said = run(launched(command(output, resume=True, **ALL), "eight_gpus_fsdp", 4))
    assert "step-00000004" in said
    same_curves(one, output)
    same_model(one, output)


def test_an_fsdp2_run_is_refused_to_a_process_that_holds_the_whole(fsdp, command, in_process, tmp_path):
    output = continued(fsdp, tmp_path / "continued")
    with pytest.raises(CheckpointError, match=r"written under FSDP.*config of accelerate that it began with"):
        in_process(command(output, resume=True, **ALL))
    assert (output / "checkpoints/step-00000004").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_one_process_alone_reads_the_weights_and_its_patch_reaches_the_others(tmp_path):
    run_on_two("support.sharded_load", tmp_path)
    (reader, found), (other, of_other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole = sum(value.nbytes for name, value in found.items() if name.startswith("dense")) / 2**20
    assert whole > 30
    assert reader > 0.8 * whole
    assert other < 0.2 * whole
    assert found.keys() == of_other.keys()
    for name, value in found.items():
        assert torch.equal(of_other[name], value), name
        if "zeroth_bias" in name:
            assert value.eq(0).all()
        elif f"dense {name}" in found:
            assert torch.equal(value, found[f"dense {name}"])
    assert sum("inv_freq" in name and bool(value.all()) for name, value in of_other.items()) >= 1


@needs_deepspeed
def test_zero3_gives_the_loss_curve_of_one_process_and_continues(command, in_process, tmp_path):
    one, zero, resumed = (tmp_path / name for name in ("one", "zero", "resumed"))
    in_process(command(one, **FIELDS))
    run(launched(command(zero, **FIELDS), "eight_gpus_zero3", 2))
    same_curves(one, zero)
    same_model(one, zero)
    run(launched(command(continued(zero, resumed), resume=True, **FIELDS), "eight_gpus_zero3", 2))
    same_curves(one, resumed)
    said = run(
        launched(command(continued(zero, tmp_path / "four"), resume=True, **FIELDS), "eight_gpus_zero3", 4),
        ok=False,
    )
    assert "holds the pieces of 2 processes of DeepSpeed" in said
