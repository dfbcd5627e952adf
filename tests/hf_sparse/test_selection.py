"""Blocks chosen by patterns on their names; what is kept in the config are their numbers."""

from __future__ import annotations

import pytest
import torch

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.modules import SparseBlock
from support.composites import composite, logits


def patched(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseBlock)]


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ({"include": "*.1.mlp"}, (1,)),
        ({"include": ["model.layers.0.*", "*.layers.2.mlp"]}, (0, 2)),
        ({"exclude": "*.0.*"}, (1, 2)),
        ({"include": ("*.[01].mlp",), "exclude": ("*.1.mlp",)}, (0,)),
        ({"include": "*"}, None),
        ({"include": "*mlp", "exclude": ["*.2.mlp", "*.0.mlp"]}, (1,)),
    ],
)
def test_patterns_choose_blocks_and_the_config_keeps_their_numbers(
    tiny_model, input_ids, tmp_path, choice, layers
) -> None:
    model = tiny_model("llama")
    seen = [block.name for block in hf_sparse.inspect(model, **choice).blocks]
    report = hf_sparse.patch(model, "relu", **choice)
    assert report.config == SparsityConfig(activation="relu", layers=layers)
    assert model.config.hf_sparse["layers"] == (None if layers is None else list(layers))
    assert patched(model) == [f"model.layers.{i}.mlp" for i in layers or range(3)] == seen
    twin = tiny_model("llama")
    twin.load_state_dict(model.state_dict())
    hf_sparse.patch(twin, "relu", layers=layers)
    assert torch.equal(model(input_ids).logits, twin(input_ids).logits)
    model.save_pretrained(tmp_path)
    assert patched(type(model).from_pretrained(tmp_path)) == seen


def test_a_value_for_each_selected_block(tiny_model) -> None:
    model = tiny_model("llama")
    report = hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.3), exclude="*.1.mlp")
    assert [block.activation.threshold for block in report.blocks] == [0.1, 0.3]
    with pytest.raises(
        PatchError, match=r"activation has values for 2 blocks, but include and exclude select 1;"
    ):
        hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.3), include="*.1.mlp")


def test_names_are_those_of_the_outer_model() -> None:
    model = composite("gemma3")
    dense = logits(model, "gemma3")
    hf_sparse.patch(model, "relu", include="model.language_model.layers.2.*")
    assert patched(model) == ["model.language_model.layers.2.mlp"]
    hf_sparse.patch(model, "relu", part="vision", exclude="*vision_tower*.0.mlp")
    assert patched(model)[0] == "model.vision_tower.encoder.layers.1.mlp"
    hf_sparse.unpatch(model)
    assert torch.equal(logits(model, "gemma3"), dense)
    with pytest.raises(
        PatchError, match=r"include='\*vision\*' matches no MLP block.*language_model\.layers\.0"
    ):
        hf_sparse.patch(model, "relu", include="*vision*")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"include": "*.9.mlp"},
            r"include='\*\.9\.mlp' matches no MLP block\. Patterns are for the whole name, such as "
            r"'model\.layers\.0\.mlp', 'model\.layers\.1\.mlp', 'model\.layers\.2\.mlp' and 1 more; \*",
        ),
        ({"exclude": "layers.0.mlp"}, r"exclude='layers\.0\.mlp' matches no MLP block"),
        ({"include": ["*.0.mlp", "*.7.mlp"]}, r"include='\*\.7\.mlp' matches no MLP block"),
        ({"exclude": "*"}, r"exclude=\['\*'\] leaves no MLP block; there are 'model\.layers\.0\.mlp'"),
        ({"include": ""}, "include='' is no pattern or sequence of patterns"),
        ({"include": []}, r"include=\[\] is no pattern or sequence of patterns"),
        ({"include": [1]}, r"include=\[1\] is no pattern or sequence of patterns"),
        ({"exclude": 3}, "exclude=3 is no pattern or sequence of patterns"),
        ({"include": "*.0.mlp", "layers": [0]}, r"layers=\(0,\) and include or exclude both choose blocks"),
    ],
)
def test_mistakes_are_named_and_nothing_is_patched(tiny_model, choice, message) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    config = model.config.to_dict()
    with pytest.raises(PatchError, match=message):
        hf_sparse.patch(model, "relu", **choice)
    assert not patched(model)
    assert model.config.to_dict() == config


def test_patterns_are_for_places_of_blocks_under_peft(tiny_model) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    model = peft.get_peft_model(tiny_model("llama"), config)
    hf_sparse.patch(model, "relu", include="model.layers.1.mlp")
    assert hf_sparse.inspect(model).config.layers == (1,)
