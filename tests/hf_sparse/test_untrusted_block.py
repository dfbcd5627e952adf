"""A config block from anywhere: refused by name, or the model computes what it says. Never anything else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.activations.config import ACTIVATIONS
from hf_sparse.adapters import find_blocks
from support.activations import own_field
from triton_ops.activations import TABLE

SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def plain_config(**fields) -> dict:
    return json.loads(json.dumps({**LlamaConfig(**SIZES).to_dict(), **fields}))


def built(data: dict) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig.from_dict(data))


@st.composite
def honest(draw: st.DrawFn) -> dict:
    """A config as a patch writes it."""
    name = draw(st.sampled_from(ACTIVATIONS))
    layers = draw(st.sampled_from([None, [1], [0, 2], [0, 1, 2]]))
    fields: dict = {} if name == "original" else {"mix": draw(st.sampled_from([0.0, 0.25, 1.0]))}
    if name in TABLE and (own := TABLE[name].parameter):
        count = len(layers or range(3))
        number = st.sampled_from([0.0, 0.1, 2.0])
        fields[own.name] = draw(number | st.lists(number, min_size=count, max_size=count))
    model = built(plain_config(**own_field(name)))
    hf_sparse.patch(model, SparsityConfig.read(name, **fields, layers=layers))
    return json.loads(json.dumps(model.config.to_dict()))


hostile = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, -1, 2**31, 10**30, 10**400, 0.0, -0.0, 0.5, -0.5, 1.0, 1e300]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "relu", "silu", "hf_sparse", "gelu", "RELU", "r\u0435lu", "relu\x00", "\ud800"]),
    st.sampled_from(["model_type", "_name_or_path", "hidden_act", "__class__", "hidden_size", "xielu"]),
    st.sampled_from([[], {}, [[]], ["relu"], {"name": "relu"}, [0.1, 0.2, 0.3], [0], [2, 1, 0], [0, 0]]),
    st.sampled_from([{"name": ["relu"]}, {"name": "relu", "": 0}, {"field": "hidden_act"}, [True]]),
    st.just("x" * 100_000),
    st.just([0.5] * 70_000),
)
KEYS = ["format_version", "activation", "layers", "blocks", "stock", "name", "threshold", "shift", "mix"]


@st.composite
def attacked(draw: st.DrawFn) -> dict:
    """The same with a few values replaced, removed or added."""
    data = draw(honest())
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.integers(0, 9))
        if kind == 0:
            data["hf_sparse"] = copy.deepcopy(draw(hostile))
        elif kind < 3:
            field = draw(st.sampled_from(["hidden_act", "_name_or_path", "more"]))
            data[field] = draw(st.sampled_from(["silu", "relu", "relu2", "gelu", "hf_sparse"]))
        elif isinstance(block := data["hf_sparse"], dict):
            places = [block, *(inner for inner in block.values() if isinstance(inner, dict))]
            place = draw(st.sampled_from(places))
            key = draw(st.sampled_from([*place, *KEYS]))
            if draw(st.integers(0, 3)) == 0:
                place.pop(key, None)
            else:
                place[key] = copy.deepcopy(draw(hostile))
    return data


def activation_of(block: dict) -> dict:
    activation = block.get("activation", "relu")
    return {"name": "relu", **({"name": activation} if isinstance(activation, str) else activation)}


def says(block: dict, index: int, p: torch.Tensor) -> torch.Tensor:
    """What the ``index``-th MLP is to make of its pre-activation, read off the block independently."""
    original = ACT2FN[block["stock"]["activation"]](p)
    layers, activation = block.get("layers"), activation_of(block)
    if (layers is not None and index not in layers) or activation["name"] == "original":
        return original
    value = activation.get("threshold", activation.get("shift", 0.0))
    if isinstance(value, list):
        value = value[index if layers is None else layers.index(index)]
    k = activation.get("mix", 1)
    return (1 - k) * original + k * TABLE[activation["name"]].value(p, float(value))


@given(attacked())
@settings(max_examples=80, deadline=None)
@pytest.mark.slow
def test_a_block_is_refused_by_name_or_the_model_computes_what_it_says(data: dict) -> None:
    try:
        model = built(copy.deepcopy(data))
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "hf_sparse" in refused
        assert len(refused) < 1000
        return
    p, block = torch.linspace(-3, 3, 50), data["hf_sparse"]
    mlps, _ = find_blocks(model)
    assert len(mlps) == 3
    for index, mlp in enumerate(mlps):
        torch.testing.assert_close(mlp.activation(p), says(block, index, p))
        patched = type(mlp.module).__name__ == "SparseGatedMLP"
        is_drelu = activation_of(block)["name"] == "drelu"
        assert getattr(mlp.module, "relu_up", False) == (is_drelu and patched)
    # The way back writes the activation field and nothing else.
    before = model.config.to_dict()
    hf_sparse.unpatch(model)
    after = model.config.to_dict()
    assert {key for key in before if before[key] != after.get(key)} <= {"hidden_act", "hf_sparse"}
    assert after["hidden_act"] == block["stock"]["activation"]
    assert "hf_sparse" not in after


@given(honest())
@settings(max_examples=25, deadline=None)
def test_what_a_patch_writes_is_not_refused(data: dict) -> None:
    assert built(data).config.hf_sparse == data["hf_sparse"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "silu"}, "hidden_act='silu' contradicts it"),
        ({"hidden_act": "relu"}, "hidden_act='relu' contradicts it"),
        ({"hf_sparse": None}, "it is a mapping, not NoneType"),
        ({"hf_sparse": []}, "it is a mapping, not list"),
        ({"field": "model_type"}, "stock.field='model_type'"),
        ({"_name_or_path": "relu", "field": "_name_or_path"}, "_name_or_path='relu' contradicts it"),
        ({"more": "hf_sparse", "field": "more"}, "stock.field='more' does not set the activation"),
        ({"blocks": 3}, "blocks=3 has no meaning"),
        ({"activation": "hf_sparse"}, "stock.activation='hf_sparse'"),
        ({"activation": "xielu"}, "stock.activation='xielu'"),
    ],
)
def test_a_contradiction_is_refused_when_the_model_is_built(change: dict, named: str) -> None:
    model = built(plain_config())
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    data = json.loads(json.dumps(model.config.to_dict()))
    for key, value in change.items():
        if key in ("field", "activation"):
            data["hf_sparse"]["stock"][key] = value
        elif key == "blocks":
            data["hf_sparse"][key] = value
        else:
            data[key] = value
    with pytest.raises(ValueError, match='the "hf_sparse" block of the model config cannot be used') as error:
        built(data)
    assert named in str(error.value)


def test_of_two_fields_that_say_the_same_the_one_that_is_read_counts() -> None:
    model = built(plain_config())
    hf_sparse.patch(model, "relu")
    data = {**model.config.to_dict(), "more": "relu"}
    assert len(hf_sparse.inspect(built(data)).blocks) == 3
    data["hf_sparse"] = {**data["hf_sparse"], "stock": {"field": "more", "activation": "silu"}}
    with pytest.raises(ValueError, match=r"stock\.field='more' does not set the activation"):
        built(data)


@pytest.mark.parametrize("depth", [20, 400, 2000, 100_000])
def test_a_block_that_nests_without_end_is_refused(tiny_model, tmp_path, depth) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"name": "relu"' in text
    text = text.replace('"name": "relu"', f'"name": {"[" * depth}{"]" * depth}')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"hf_sparse.*nests more than|nests too deeply.*hf_sparse"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_blocks_that_can_be_patched_is_refused(tiny_model) -> None:
    mamba = tiny_model("mamba", state_size=4)
    mamba.config.hf_sparse = {
        "activation": {"name": "relu"},
        "stock": {"field": "hidden_act", "activation": "silu"},
    }
    mamba.config.hidden_act = "relu"
    with pytest.raises(ValueError, match=r'"hf_sparse" block .* no MLP block of a known shape'):
        type(mamba)(mamba.config)


def test_our_activation_without_a_block_is_refused_at_loading() -> None:
    config = LlamaConfig(**SIZES, hidden_act="hf_sparse")
    with pytest.raises(ValueError, match='hidden_act="hf_sparse" needs the "hf_sparse" block'):
        AutoModelForCausalLM.from_config(config)


def test_a_field_called_self_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown fields in activation: self; known: name"):
        SparsityConfig.from_dict({"activation": {"name": "relu", "self": 1}})
