"""Models whose config has no field for the activation, or none that may say ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
    Qwen4ExpTextConfig,
    xLSTMConfig,
)

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.modules import SparseBlock

IDS = torch.arange(3, 21).reshape(2, 9)

QWEN4: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "max_position_embeddings": 64,
    "layer_types": ["linear_attention"] * 2,
}


def strong(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def xlstm() -> PreTrainedModel:
    """Its feed-forward is gated, with nn.SiLU written into the class."""
    config = xLSTMConfig(
        vocab_size=64,
        hidden_size=32,
        num_heads=2,
        num_hidden_layers=3,
        ffn_round_up_to_multiple_of=8,
        mlstm_round_up_to_multiple_of=8,
        chunk_size=16,
    )
    return strong(AutoModelForCausalLM.from_config(config))


def openai_gpt() -> PreTrainedModel:
    """It has a table of activations of its own, in which ours is not."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    return strong(AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **sizes)))


def qwen4() -> PreTrainedModel:
    """Its config accepts "silu" and "sigmoid" only as hidden_act, which its attention reads, too."""
    return strong(AutoModelForCausalLM.from_config(Qwen4ExpTextConfig(**QWEN4)))


def qwen4_with_images() -> PreTrainedModel:
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen4ExpConfig(text_config=QWEN4, vision_config={**sizes, "num_position_embeddings": 16})
    return strong(Qwen4ExpForConditionalGeneration(config))


class FixedConfig(PretrainedConfig):
    model_type = "hf_sparse_test_fixed"

    def __init__(self, layers: int = 3, slopes: tuple[float, ...] = (1.0, 1.0, 1.0), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_hidden_layers, self.hidden_size, self.slopes = layers, 16, list(slopes)


class FixedMLP(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 40), nn.Linear(40, 16)
        self.act = nn.Softplus(beta=slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class FixedModel(PreTrainedModel):
    """Its activation is one that transformers has no name for."""

    config_class = FixedConfig
    base_model_prefix = "model"

    def __init__(self, config: FixedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(FixedMLP(config.slopes[i]) for i in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def fixed() -> Iterator[type[FixedModel]]:
    AutoConfig.register(FixedConfig.model_type, FixedConfig)
    AutoModel.register(FixedConfig, FixedModel)
    yield FixedModel
    AutoModel._model_mapping._extra_content.pop(FixedConfig)
    del AutoConfig.register.__globals__["CONFIG_MAPPING"]._extra_content[FixedConfig.model_type]


def output(model: PreTrainedModel) -> Tensor:
    cache = {} if model.config.model_type == "openai-gpt" else {"use_cache": False}
    with torch.no_grad():
        found = model(input_ids=IDS, **cache)
    return found if isinstance(found, Tensor) else found.logits


CONFIGS = {
    "relu": SparsityConfig(activation="relu"),
    "thresholds": SparsityConfig.read("fatrelu", threshold=(0.1, 0.2), layers=(0, 1)),
    "mixed": SparsityConfig.read("relu", mix=0.25),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", [xlstm, openai_gpt, qwen4, qwen4_with_images])
@pytest.mark.slow
def test_round_trip(make, name, tmp_path) -> None:
    model = make()
    dense = output(model)
    model.save_pretrained(tmp_path)
    config = model.config.to_dict()
    hf_sparse.patch(model, "original")
    assert torch.equal(output(model), dense)
    hf_sparse.patch(model, CONFIGS[name])
    expected = output(model)
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["fusion_config"] == {"hf_sparse": True}
    assert saved.get("text_config", saved)["hf_sparse"]["stock"]["field"] is None
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), expected)
    assert hf_sparse.inspect(loaded).config == CONFIGS[name]
    for one in (loaded, model):
        hf_sparse.unpatch(one)
        assert torch.equal(output(one), dense)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    assert "hf_sparse" not in (tmp_path / "config.json").read_text()


def test_the_changed_function_is_that_of_the_activation_swapped_by_hand() -> None:
    model = xlstm()
    report = hf_sparse.patch(model, "relu")
    assert (report.original_activation, report.stock_name, report.field) == ("swish", None, None)
    changed = output(model)
    hf_sparse.unpatch(model)
    for block in report.blocks:
        model.get_submodule(block.name).act_fn = nn.ReLU()
    torch.testing.assert_close(changed, output(model))


def test_an_activation_without_a_name(fixed, tmp_path) -> None:
    model = strong(fixed(FixedConfig()))
    dense = output(model)
    report = hf_sparse.patch(model, "fatrelu", threshold=0.1, layers=[0, 2])
    assert model.config.hf_sparse["stock"] == {"field": None, "activation": None}
    assert "activation: Softplus -> fatrelu" in str(report)
    expected = output(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), expected)
    assert "Softplus" in (tmp_path / "README.md").read_text()
    hf_sparse.unpatch(loaded)
    assert torch.equal(output(loaded), dense)


def test_blocks_whose_own_activations_differ(fixed, tmp_path) -> None:
    model = strong(fixed(FixedConfig(slopes=(1.0, 2.0, 3.0))))
    dense = output(model)
    hf_sparse.patch(model, "relu", mix=0.5)
    expected = output(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), expected)
    hf_sparse.set_mix(loaded, 0.0)
    torch.testing.assert_close(output(loaded), dense)


@pytest.mark.parametrize("patched", [True, False])
def test_an_own_activation_exchanged_by_hand_is_refused(fixed, patched, tmp_path) -> None:
    model = strong(fixed(FixedConfig()))
    hf_sparse.patch(model, "relu", layers=[0, 2])
    owner = model.layers[0].stock if patched else model.layers[1]
    owner.act = nn.Softplus(beta=5.0)
    for look in (lambda: hf_sparse.inspect(model), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(
            PatchError, match=r"the config says that .* is Softplus\(beta=1.0.*, but it is Softplus"
        ):
            look()


def test_the_activation_that_the_class_has_anyway_is_no_other_model(tmp_path) -> None:
    model = xlstm()
    assert hf_sparse.patch(model, "original").stock_name == "swish"
    model.save_pretrained(tmp_path)
    assert "fusion_config" not in json.loads((tmp_path / "config.json").read_text())
    hf_sparse.patch(model, "relu")
    assert model.config.fusion_config == {"hf_sparse": True}
    hf_sparse.patch(model, "original")
    assert not hasattr(model.config, "fusion_config")


def test_other_fusions_stay(tmp_path) -> None:
    model = xlstm()
    model.config.fusion_config = {"patch_embeddings": False}
    hf_sparse.patch(model, "relu")
    assert model.config.fusion_config == {"patch_embeddings": False, "hf_sparse": True}
    hf_sparse.unpatch(model)
    assert model.config.fusion_config == {"patch_embeddings": False}


def test_a_load_with_other_fusions_is_mended_when_it_is_saved(tmp_path) -> None:
    model = xlstm()
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, fusion_config={"patch_embeddings": False})
    assert torch.equal(output(loaded.eval()), output(model))
    loaded.save_pretrained(tmp_path)
    fusions = json.loads((tmp_path / "config.json").read_text())["fusion_config"]
    assert fusions == {"patch_embeddings": False, "hf_sparse": True}


def test_the_readme_names_the_versions_that_would_run_another_model(tmp_path) -> None:
    model = xlstm()
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert (
        "| transformers alone | from version 5 on refuses to load it: `ValueError: Unknown fusion type"
        in card
    )
    assert "| transformers 4 alone | **wrong without an error**: computes `swish`" in card


@pytest.mark.parametrize(
    ("stock", "named"),
    [
        ({"field": None, "activation": "gelu"}, "stock.activation='gelu' is not what xLSTM"),
        ({"field": None, "activation": "xielu"}, "stock.activation='xielu' is not one that"),
        ({"field": None, "activation": 3}, "stock.activation=3 is not one that"),
        ({"field": None, "activation": "hf_sparse"}, "stock.activation='hf_sparse' is not one that"),
        ({"field": None}, 'is not {"field": ..., "activation": ...}'),
        ({"field": "hidden_act", "activation": None}, "stock.activation=None is not one that"),
        ({"field": "weight_mode", "activation": "silu"}, "stock.field='weight_mode' is no field"),
        ({"field": 0, "activation": "silu"}, "stock.field=0 is no field"),
    ],
)
def test_a_record_that_is_wrong_about_it_is_refused(stock, named, tmp_path) -> None:
    model = xlstm()
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["hf_sparse"]["stock"] = stock
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match='the "hf_sparse" block of the model config cannot be used') as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert named in str(error.value)


def test_no_field_where_the_field_says_ours_is_refused(tiny_model) -> None:
    model = tiny_model("llama")
    for activation in (None, "silu"):
        hf_sparse.patch(model, "relu", mix=0.5)
        config = model.config
        config.hf_sparse = {**config.hf_sparse, "stock": {"field": None, "activation": activation}}
        with torch.device("meta"), pytest.raises(ValueError, match="which is UnpatchedActivation"):
            type(model)(config)
        config.hf_sparse["stock"] = {"field": "hidden_act", "activation": "silu"}
        hf_sparse.unpatch(model)


def test_a_part_of_a_model_whose_blocks_differ_fails_loudly(tmp_path) -> None:
    model = xlstm()
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="blocks=3 is not the number of MLP blocks"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_blocks=2, num_hidden_layers=2)
    part = AutoModel.from_pretrained(tmp_path, num_blocks=2, num_hidden_layers=2)
    with pytest.raises(RuntimeError, match="another number of MLP blocks"):
        part(IDS, use_cache=False)
    with pytest.raises(PatchError, match="was to be patched and is not"):
        part.save_pretrained(tmp_path / "again")


class FixedPair(PreTrainedModel):
    """Two models of one config, each of which holds a half of the blocks."""

    config_class = FixedConfig

    def __init__(self, config: FixedConfig) -> None:
        super().__init__(config)
        self.first, self.second = FixedModel(config), FixedModel(config)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.first(input_ids) + self.second(input_ids)


def test_halves_that_hold_some_of_the_blocks_are_patched_by_the_whole(fixed, tmp_path) -> None:
    model = strong(FixedPair(FixedConfig()))
    dense = output(model)
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    expected = output(model)
    model.save_pretrained(tmp_path)
    loaded = FixedPair.from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), expected)
    hf_sparse.unpatch(loaded)
    assert torch.equal(output(loaded), dense)


@pytest.mark.parametrize("fusions", [[], "hf_sparse", 3, None, {"hf_sparse": 1}])
def test_fusions_of_any_kind_in_a_config_are_no_error_of_ours(fusions) -> None:
    model = xlstm()
    model.config.fusion_config = fusions
    hf_sparse.patch(model, "relu")
    assert model.config.fusion_config["hf_sparse"] is True


PLAIN_LOAD = """
import sys
import transformers

for folder, cls in (pair.split("=") for pair in sys.argv[1:]):
    try:
        getattr(transformers, cls).from_pretrained(folder)
    except ValueError as error:
        print(error)
    else:
        print("loaded")
assert "hf_sparse" not in sys.modules
"""


@pytest.mark.slow
def test_transformers_alone_refuses_to_load_it(tmp_path) -> None:
    given = []
    for name, make in (("xlstm", xlstm), ("qwen4", qwen4), ("composite", qwen4_with_images)):
        model = make()
        hf_sparse.patch(model, "relu")
        model.save_pretrained(tmp_path / name)
        given.append(f"{tmp_path / name}={type(model).__name__}")
    given.append(f"{tmp_path / 'composite'}=Qwen4ExpTextModel")
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_LOAD, *given], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["Unknown fusion type: hf_sparse"] * 4


def test_uninstall_takes_the_fusion_away(tmp_path) -> None:
    model = xlstm()
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    hf_sparse.uninstall()
    try:
        with pytest.raises(ValueError, match="Unknown fusion type: hf_sparse"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        hf_sparse.install()
    assert any(isinstance(m, SparseBlock) for m in AutoModelForCausalLM.from_pretrained(tmp_path).modules())


def test_a_config_that_is_not_kept_is_refused_before_anything_changes(fixed) -> None:
    class Forgetful(FixedConfig):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

        def to_dict(self) -> dict[str, Any]:
            return {k: v for k, v in super().to_dict().items() if k != "hf_sparse"}

    model = strong(fixed(Forgetful()))
    before, modules = output(model), dict(model.named_modules())
    with pytest.raises(PatchError, match="Forgetful keeps no field of ours in it"):
        hf_sparse.patch(model, "relu")
    assert dict(model.named_modules()) == modules
    assert not hasattr(model.config, "hf_sparse")
    assert torch.equal(output(model), before)


def test_a_config_saved_without_its_model_is_refused_elsewhere_as_well(tmp_path) -> None:
    """The config alone is complete, also when it is saved without the model."""
    model = xlstm()
    hf_sparse.patch(model, "relu")
    model.config.save_pretrained(tmp_path)
    assert json.loads(Path(tmp_path, "config.json").read_text())["fusion_config"] == {"hf_sparse": True}
