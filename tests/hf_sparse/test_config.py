import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse import SparsityConfig
from hf_sparse.config import ACTIVATIONS

finite = st.floats(0, 1e6, allow_nan=False)


@st.composite
def configs(draw: st.DrawFn) -> SparsityConfig:
    activation = draw(st.sampled_from(ACTIVATIONS))
    layers = draw(st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True))
    mix = 1.0 if activation == "original" else draw(st.floats(0, 1))
    fields: dict = {"activation": activation, "mix": mix, "layers": layers, "certify": draw(st.booleans())}
    if activation == "fatrelu":
        count = len(layers) if layers else draw(st.integers(1, 5))
        fields["threshold"] = draw(finite | st.lists(finite, min_size=count, max_size=count))
    if activation == "shifted_relu":
        fields["shift"] = draw(st.floats(-1e6, 1e6))
    return SparsityConfig(**fields)


@given(configs())
def test_json_round_trip_is_exact(config: SparsityConfig) -> None:
    assert SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"activation": "silu"}, "activation='silu'"),
        ({"activation": None}, "activation=None"),
        ({"activation": "fatrelu", "threshold": -0.1}, "threshold=-0.1"),
        ({"activation": "fatrelu", "threshold": float("nan")}, "threshold=nan"),
        ({"activation": "fatrelu", "threshold": "0.1"}, "threshold='0.1'"),
        ({"activation": "fatrelu", "threshold": True}, "threshold=True"),
        ({"activation": "relu", "threshold": 0.1}, "threshold=0.1"),
        ({"activation": "fatrelu", "threshold": [0.1, 0.2], "layers": [1]}, "threshold has 2 values"),
        ({"activation": "relu", "shift": 1.0}, "shift=1.0"),
        ({"activation": "shifted_relu", "shift": float("inf")}, "shift=inf"),
        ({"mix": 1.5}, "mix=1.5"),
        ({"activation": "original", "mix": 0.5}, "mix=0.5"),
        ({"certify": 1}, "certify=1 is neither True nor False"),
        ({"certify": "yes"}, "certify='yes'"),
        ({"layers": []}, "layers"),
        ({"layers": [0, 0]}, "twice"),
        ({"layers": [-1]}, "layers=[-1]"),
        ({"layers": 3}, "layers=3"),
    ],
)
def test_bad_field_is_named(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        SparsityConfig(**fields)


def test_a_config_from_before_certify_loads() -> None:
    assert SparsityConfig.from_dict({"format_version": 1, "activation": "relu"}) == SparsityConfig()
    assert not SparsityConfig().certify


def test_layers_are_sorted_and_thresholds_are_floats() -> None:
    config = SparsityConfig(activation="fatrelu", layers=[3, 1], threshold=[1, 2])
    assert config.layers == (1, 3)
    assert config.threshold == (2.0, 1.0)  # still of the layers they were given for


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"format_version": 2}, "format_version=2"),
        ({"activation": "relu", "magic": 1}, "magic"),
        ([], "list"),
    ],
)
def test_unreadable_dict_is_refused(data: object, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        SparsityConfig.from_dict(data)  # type: ignore[arg-type]
