"""Parameters of ours in a patched block: saved under our name, initialised when missing, kept when loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers import initialization as init

import hf_sparse
from hf_sparse.config import PARTS
from hf_sparse.modules import ParameterLeaf
from hf_sparse.parts import Part
from support.peek import sparse_blocks


class Scale(ParameterLeaf):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.weight, 7.0)


@dataclass(frozen=True)
class ScaleConfig(Part):
    """A part that this test alone knows."""

    @classmethod
    def read(cls, value: Any) -> ScaleConfig:
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {}

    def build(self, mlp: torch.nn.Module, index: int) -> None:
        mlp.scale = Scale(4)


@pytest.fixture
def scaled(tiny_model, monkeypatch) -> Iterator[Any]:
    monkeypatch.setitem(PARTS, "scale", ScaleConfig)
    model = tiny_model("llama")
    hf_sparse.patch(model, hf_sparse.SparsityConfig(activation="relu", scale=ScaleConfig()))
    for block in sparse_blocks(model):
        torch.nn.init.constant_(block.scale.weight, 3.0)
    return model


def scales(model: Any) -> list[float]:
    return [block.scale.weight.unique().item() for block in sparse_blocks(model)]


def test_a_model_with_them_is_not_saved_as_plain_relu(scaled, tmp_path) -> None:
    assert hf_sparse.inspect(scaled).stock_name is None
    scaled.save_pretrained(tmp_path)
    assert '"hidden_act": "hf_sparse"' in (tmp_path / "config.json").read_text()


def test_loaded_ones_are_kept_and_missing_ones_initialised(scaled, tmp_path) -> None:
    scaled.save_pretrained(tmp_path)
    assert scales(AutoModelForCausalLM.from_pretrained(tmp_path)) == [3.0] * 3
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert tensors.pop("model.layers.1.mlp.scale.weight") is not None
    save_file(tensors, path, metadata={"format": "pt"})
    assert scales(AutoModelForCausalLM.from_pretrained(tmp_path)) == [3.0, 7.0, 3.0]


def test_one_that_no_part_of_the_config_tells_of_is_not_saved_silently(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    next(sparse_blocks(model)).scale = Scale(4)
    with pytest.raises(hf_sparse.PatchError, match="scale"):
        model.save_pretrained(tmp_path)


def test_a_module_that_stays_as_it_is_takes_none(tiny_model, monkeypatch) -> None:
    monkeypatch.setitem(PARTS, "scale", ScaleConfig)
    model = tiny_model("opt")
    with pytest.raises(hf_sparse.PatchError, match=r"model\.decoder\.layers\.0 stays a OPTDecoderLayer"):
        hf_sparse.patch(model, hf_sparse.SparsityConfig(activation="relu", scale=ScaleConfig()))
    assert type(model.model.decoder.layers[0].fc2) is torch.nn.Linear
