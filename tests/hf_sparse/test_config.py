import copy
import json
import pickle
import re
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse import ActivationConfig, SparsityConfig
from hf_sparse.activations.config import ACTIVATIONS
from triton_ops.activations import TABLE

finite = st.floats(0, 1e6, allow_nan=False)


@st.composite
def configs(draw: st.DrawFn) -> SparsityConfig:
    name = draw(st.sampled_from(ACTIVATIONS))
    layers = draw(st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True))
    fields: dict = {} if name == "original" else {"mix": draw(st.floats(0, 1))}
    if name in TABLE and (own := TABLE[name].parameter):
        count = len(layers) if layers else draw(st.integers(1, 5))
        fields[own.name] = draw(finite | st.lists(finite, min_size=count, max_size=count))
    zeroth = st.fixed_dictionaries(
        {}, optional={"placement": st.just("output"), "positions": st.integers(1, 9)}
    )
    others = {"zeroth_bias": draw(st.none() | zeroth)}
    return SparsityConfig(activation=ActivationConfig(name=name, **fields), layers=layers, **others)


@given(configs())
def test_json_round_trip_is_exact(config: SparsityConfig) -> None:
    again = SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert repr(again) == repr(config)


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (SparsityConfig(), {"name": "relu"}),
        (SparsityConfig.read("fatrelu", threshold=0.01), {"name": "fatrelu", "threshold": 0.01}),
        (SparsityConfig.read("fatrelu", threshold=(0.1, 0.2)), {"name": "fatrelu", "threshold": [0.1, 0.2]}),
        (SparsityConfig.read("cats_silu", threshold=0.25), {"name": "cats_silu", "threshold": 0.25}),
        (SparsityConfig.read("shifted_relu", shift=-1), {"name": "shifted_relu", "shift": -1.0}),
        (SparsityConfig.read("jsrelu", mix=0.4), {"name": "jsrelu", "mix": 0.4}),
    ],
)
def test_only_what_an_activation_has_is_written(config: SparsityConfig, written: dict) -> None:
    assert config.to_dict() == {"format_version": 1, "activation": written, "layers": None}


def test_all_ways_to_say_it_are_one_config() -> None:
    config = SparsityConfig(activation=ActivationConfig(name="fatrelu", threshold=0.5), layers=(1, 2))
    assert SparsityConfig(activation={"name": "fatrelu", "threshold": 0.5}, layers=[2, 1]) == config
    assert SparsityConfig.read("fatrelu", threshold=0.5, layers=[1, 2]) == config
    assert SparsityConfig.read(config) is config
    assert SparsityConfig.read(config.to_dict()) == config
    assert config.activation.threshold == 0.5
    assert SparsityConfig(activation="relu") == SparsityConfig()


def test_a_config_is_a_value() -> None:
    config = SparsityConfig.read("fatrelu", threshold=(0.5, 1.0))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.layers = None
    with pytest.raises(FrozenInstanceError):
        config.activation.mix = 0.5
    with pytest.raises(AttributeError, match="shift"):
        config.activation.shift  # noqa: B018
    mixed = config.changed(activation=config.activation.with_mix(0.5))
    assert mixed.activation == ActivationConfig(name="fatrelu", threshold=(0.5, 1.0), mix=0.5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "silu"}, "activation.name='silu' is not known; choose one of original, relu"),
        ({"name": "r\u0435lu"}, "activation.name='r\\u0435lu'"),  # a Cyrillic letter
        ({"name": None}, "activation.name=None"),
        ({"name": ["relu"]}, "activation.name=['relu']"),
        ({"name": "fatrelu", "threshold": -0.1}, "activation.threshold=-0.1 is too small"),
        ({"name": "fatrelu", "threshold": float("nan")}, "activation.threshold=nan"),
        ({"name": "fatrelu", "threshold": "0.1"}, "activation.threshold='0.1'"),
        ({"name": "fatrelu", "threshold": True}, "activation.threshold=True"),
        ({"name": "fatrelu", "threshold": 10**400}, "activation.threshold=<an integer of 1329 bits>"),
        ({"name": "fatrelu", "threshold": 1e300}, "beyond what float32"),
        ({"name": "fatrelu", "threshold": []}, "activation.threshold=[]"),
        ({"name": "fatrelu", "threshold": [0.1, [0.2]]}, "activation.threshold=[0.2]"),
        (
            {"name": "relu", "threshold": 0.1},
            "activation.threshold=0.1 has no meaning for 'relu'; use 'fatrelu'",
        ),
        (
            {"name": "cats_gelu", "threshold": -0.1},
            "activation.threshold=-0.1 is too small; that of cats_gelu",
        ),
        (
            {"name": "jsrelu", "threshold": 0.1},
            "use 'fatrelu' or 'cats_silu' or 'cats_gelu' or 'cats_gelu_tanh', or leave threshold out",
        ),
        ({"name": "fatrelu", "shift": 0.1}, "activation.shift=0.1 has no meaning for 'fatrelu'"),
        ({"name": "shifted_relu", "shift": float("inf")}, "activation.shift=inf"),
        ({"mix": 1.5}, "activation.mix=1.5"),
        ({"mix": None}, "activation.mix=None"),
        ({"name": "original", "mix": 0.5}, "activation.mix=0.5 has no meaning"),
        (
            {"name": "fatrelu", "treshold": 1},
            "unknown fields in activation: treshold; known: name, threshold, mix",
        ),
    ],
)
def test_a_bad_field_of_the_activation_is_named(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        ActivationConfig(**fields)
    with pytest.raises(ValueError, match=re.escape(named)):
        SparsityConfig.from_dict({"activation": fields})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"activation": None}, "activation is a mapping, not NoneType"),
        (
            {"activation": {"name": "fatrelu", "threshold": [0.1, 0.2]}, "layers": [1]},
            "has values for 2 blocks",
        ),
        ({"layers": []}, "layers=()"),
        ({"layers": [0, 0]}, "twice"),
        ({"layers": [-1]}, "layers=[-1]"),
        ({"layers": [True]}, "layers=[True]"),
        ({"layers": [1.0]}, "layers=[1.0]"),
        ({"layers": [10**9]}, "layers=[1000000000]"),
        ({"layers": 3}, "layers=3"),
        ({"magic": 1}, "unknown fields in the config: magic; known: activation,"),
        ({"certify": True}, "unknown fields in the config: certify"),
        ({"threshold": 0.1}, "threshold is a field of the activation"),
    ],
)
def test_a_bad_field_is_named(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        SparsityConfig(**fields)


def test_layers_are_sorted_and_thresholds_are_floats() -> None:
    config = SparsityConfig.read("fatrelu", layers=[3, 1], threshold=[1, 2])
    assert config.layers == (1, 3)
    assert config.activation.threshold == (2.0, 1.0)  # still of the layers they were given for
    assert str(ActivationConfig(name="fatrelu", threshold=-0.0).threshold) == "0.0"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"format_version": 2}, "format_version=2"),
        ({"format_version": True}, "format_version=True"),
        ({"format_version": 1.0}, "format_version=1.0"),
        ({"activation": "relu", "magic": 1}, "magic"),
        ({1: "relu"}, "a field 1 that is no name"),
        ([], "list"),
    ],
)
def test_unreadable_dict_is_refused(data: object, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        SparsityConfig.from_dict(data)  # type: ignore[arg-type]


class UnseenList(list):
    def __iter__(self):
        raise AssertionError("looked at")

    __reversed__ = __contains__ = __repr__ = __iter__


class UnseenDict(dict):
    def __iter__(self):
        raise AssertionError("looked at")

    keys = items = values = __contains__ = __repr__ = __iter__


MANY = UnseenList([0.5] * 100_000)


@pytest.mark.parametrize(
    "data",
    [
        {"activation": {"name": "fatrelu", "threshold": MANY}},
        {"layers": MANY},
        {"activation": UnseenDict.fromkeys(map(str, range(100)))},
        UnseenDict.fromkeys(map(str, range(100))),
    ],
    ids=["thresholds", "layers", "fields of the part", "fields"],
)
def test_sizes_are_refused_before_an_element_is_looked_at(data: dict) -> None:
    with pytest.raises(ValueError, match=r"has 100000 elements|has 100 fields"):
        SparsityConfig.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        {"activation": "x" * 10_000_000},
        {"x" * 10_000_000: 1},
        {"activation": {"name": "x" * 10_000_000}},
        {"activation": {"x" * 10_000_000: 1}},
        {"activation": {"name": "fatrelu", "threshold": "\ud800" * 10_000_000}},
        {"layers": ["x" * 10_000_000]},
        {"format_version": [["x" * 10_000_000] * 1000] * 1000},
    ],
)
def test_a_message_shows_no_more_than_a_line_holds(data: dict) -> None:
    with pytest.raises(ValueError, match=r"activation|config|layers|version") as error:
        SparsityConfig.from_dict(data)
    assert len(str(error.value)) < 500
    assert str(error.value).isascii()
