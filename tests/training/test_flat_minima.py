"""The methods on flat minima in whole runs of finetune.py: interrupted ones, and ones with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_log import read_log
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sparse

PATCH = {"activation": "jsrelu", "zeroth_bias": {"positions": 16}}
METHODS = {"mixing": {}, "norm_uplift": {}, "zeroth_clip": {}, "weight_noise": {}}

pytestmark = pytest.mark.slow


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "model.safetensors")


def within_bounds(found: dict[str, torch.Tensor]) -> bool:
    for name in [name for name in found if "zeroth_bias" in name]:
        gain = found[name.replace("mlp.zeroth_bias.bias", "post_attention_layernorm.weight")]
        assert (gain >= 1 - 1e-6).all()
        assert 0 < found[name].abs().max() <= 0.1 * gain.max() + 1e-6
        assert (found[name].abs() <= 0.1 * gain + 1e-6).all()
    return True


def test_a_resumed_run_ends_with_the_same_bits(command, in_process, tmp_path) -> None:
    fields = {"patch": PATCH, "methods": METHODS, "save_every": 4}
    in_process(command(tmp_path / "whole", **fields))
    in_process(command(tmp_path / "cut", **fields, keep_checkpoints=9))
    for step in (8, 12):
        (checkpoint,) = (tmp_path / "cut" / "checkpoints").glob(f"*{step}")
        checkpoint.rename(tmp_path / checkpoint.name)
    in_process(command(tmp_path / "cut", **fields, keep_checkpoints=9, resume=True))
    whole = tensors(tmp_path / "whole")
    assert within_bounds(whole)
    for name, value in tensors(tmp_path / "cut").items():
        assert torch.equal(value, whole[name]), name
    last = [record for record in read_log(tmp_path / "whole" / "log.jsonl") if record["kind"] == "train"][-1]
    assert last["norm_bound"] == last["mix"] == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final")
    assert hf_sparse.inspect(model).config == hf_sparse.SparsityConfig.from_dict(PATCH)


def test_adapters_train_beside_norms_and_zeroth_biases(command, in_process, tmp_path) -> None:
    lora = {"r": 192, "alpha": 1}
    in_process(command(tmp_path, patch=PATCH, methods=METHODS, lora=lora, gradient_checkpointing=True))
    assert within_bounds(tensors(tmp_path))
