"""The speed to expect, from times that are given and from those of this machine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import hf_sparse
from hf_sparse.cli import main
from hf_sparse.expected_speed import ExpectedTime, expected_times, measured_densities, timed_layers
from hf_sparse.metrics import LayerSparsity
from hf_sparse.tuning import TunedLayer, TuneReport
from support.html_pages import Page
from support.models import tiny
from support.sites import padded, relu_model
from triton_ops import Problem
from triton_ops.tune import Measurement

GATED = Problem("gated", 32, 88, torch.float32, "cpu")
PLAIN = GATED._replace(form="plain")
LINEAR = GATED._replace(form="linear")
CERTIFIED = GATED._replace(certified=True)
TIMES = {0.1: 2.0, 0.3: 6.0, 0.5: 12.0, 1.0: 20.0}
"""Of skipping, by density; dense takes 10."""
SHARES = "Expected times of all these layers together"


def timed(problem: Problem, **changes: object) -> Measurement:
    found = Measurement(
        problem=problem, backend="cpp", dense_ms={1: 10.0, 4: 10.0}, sparse_ms={1: TIMES, 4: {1.0: 11.0}}
    )
    return replace(found, **changes)


def layer(name: str, *measurements: Measurement, **changes: object) -> TunedLayer:
    found = TunedLayer(
        name=name,
        shape="32 x 88",
        density=None,
        break_even=measurements[0].break_even if measurements else (),
        beyond=0.0,
        certified=None,
        obstacle=None,
        problems=tuple(one.problem for one in measurements),
    )
    return replace(found, **changes)


def tuned(layers: list[TunedLayer], *measurements: Measurement) -> TuneReport:
    return TuneReport(layers=tuple(layers), tokens=(1, 4), measurements=measurements)


@pytest.mark.parametrize(
    ("density", "milliseconds"),
    [
        (0.02, 2.0),  # no faster than at the least density that was timed
        (0.1, 2.0),
        (0.2, 4.0),
        (0.25, 5.0),
        (0.3, 6.0),
        (0.31, None),  # 0.5 does not pay, so what lies between does not skip
        (0.9, None),
        (math.nan, None),
        (None, None),
    ],
)
def test_a_layer_takes_what_was_timed_at_its_density(density, milliseconds):
    one = timed(GATED)
    given = {} if density is None else {"a": density}
    first, fourth = expected_times(tuned([layer("a", one)], one), given)
    skips = milliseconds is not None
    assert first == ExpectedTime(
        tokens=1, dense_ms=10.0, expected_ms=milliseconds if skips else 10.0, skipping=int(skips)
    )
    assert fourth == ExpectedTime(tokens=4, dense_ms=10.0, expected_ms=10.0, skipping=0)


def test_layers_add_up_each_at_its_own_density():
    one = timed(GATED)
    report = tuned([layer("a", one), layer("b", one), layer("c", one, density=0.1)], one)
    first, _ = expected_times(report, {"a": 0.3, "b": 0.8})
    assert (first.dense_ms, first.expected_ms, first.skipping) == (30.0, 6.0 + 10.0 + 2.0, 2)
    assert first.ratio == 30 / 18


def test_where_the_down_projection_alone_skips_the_rest_of_the_block_is_dense():
    never = {1: {0.1: 12.0}, 4: {0.1: 12.0}}
    plain, linear = (
        timed(PLAIN, sparse_ms=never),
        timed(LINEAR, dense_ms={1: 4.0, 4: 4.0}, sparse_ms={1: {0.1: 1.0}, 4: never[4]}),
    )
    first, _ = expected_times(tuned([layer("a", plain, linear)], plain, linear), {"a": 0.1})
    assert (first.dense_ms, first.expected_ms) == (10.0, 10.0 - 4.0 + 1.0)


def test_a_certificate_that_pays_is_used_for_one_token():
    one = timed(GATED)
    proof = timed(
        CERTIFIED, dense_ms={1: 10.0}, sparse_ms={1: {0.1: 1.0, 0.3: 7.0}}, uncertified_ms={1: TIMES}
    )
    report = tuned([layer("a", one, proof)], one, proof)
    assert expected_times(report, {"a": 0.1})[0].expected_ms == 1.0
    assert expected_times(report, {"a": 0.3})[0].expected_ms == 6.0


def test_layers_without_times_are_not_counted():
    one = timed(GATED)
    layers = [layer("a", one), layer("b", timed(LINEAR)), layer("c", obstacle="it is quantised")]
    report = tuned(layers, one)
    assert [found.name for found in timed_layers(report)] == ["a"]
    assert expected_times(report)[0].dense_ms == 10.0
    assert expected_times(tuned(layers[1:], one)) == ()


def test_a_wrapper_puts_something_in_front_of_names():
    one = timed(GATED)
    layers = [LayerSparsity(name=f"base.model.{n}.mlp", neurons=4, tokens=1, zeros=n) for n in (1, 3)]
    found = hf_sparse.SparsityReport(layers=tuple(layers), loss=1.0, tokens=1, predicted_tokens=1)
    report = tuned([layer("1.mlp", one), layer("3.mlp", one), layer("2.mlp", one)], one)
    assert measured_densities(report, found) == {"1.mlp": 0.75, "3.mlp": 0.25}


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_page_has_the_times_of_this_machine(name):
    model = tiny(name)
    hf_sparse.patch(model, "relu")
    report = hf_sparse.measure(model, [padded("none")])
    found = hf_sparse.tune(model, tokens=(1, 2), force=True)
    page = Page(report.to_html(model=model, speed=found))
    whole = next(one for one in found.measurements if one.problem.form != "linear")
    for tokens in (1, 2):
        row = page.row(SHARES, str(tokens))
        assert float(row["dense, ms"]) == pytest.approx(3 * whole.dense_ms[tokens], abs=0.001)
        # What pays is at most 3 % slower, and what does not runs dense.
        assert float(row["times faster"]) >= 0.96
    limits = page.row("Break-even densities by tokens in a call", found.layers[0].shape)
    told = [f"{one:.0%}" if one else "never" for one in found.layers[0].break_even]
    assert [limits["1"], limits["2"]] == told
    text = page.find("main")[0].text
    assert "It was not measured end to end" in text
    assert "3 of the 3 MLP blocks alone" in text


@pytest.mark.usefixtures("own_cache")
def test_experts_are_said_to_be_left_out():
    model = tiny("mixtral")
    hf_sparse.patch(model, "relu")
    report = hf_sparse.measure(model, [padded("none")])
    page = Page(report.to_html(model=model, speed=hf_sparse.tune(model, tokens=(1,), force=True)))
    assert SHARES not in page.tables()
    assert "3 layers are not in the expected speed: the tokens of a call are divided" in page.root.text


def test_more_shapes_than_can_be_told_apart_are_told_by_the_table():
    names = [f"model.layers.{i}.mlp" for i in range(3)]
    one = timed(GATED)
    layers = [layer(name, one, shape=f"{i} x {i}") for i, name in enumerate([*names, "q", "k"])]
    report = hf_sparse.measure(relu_model("llama"), [padded("none")])
    page = Page(report.to_html(speed=tuned(layers, one)))
    assert [row[0] for row in page.tables()["Break-even densities by tokens in a call"][1:-1]] == [
        layer.shape for layer in layers
    ]
    marks = [one.text.strip() for one in page.find("ul")[-1].children]
    assert marks == ["0 x 0", "1 x 1", "more shapes, see the table", "density of this model"]
    assert "3 of the 3 MLP blocks and 2 linear layers with thresholds alone" in page.root.text


def test_the_speed_of_another_model_is_refused():
    one = timed(GATED)
    report = hf_sparse.measure(relu_model("llama"), [padded("none")])
    with pytest.raises(ValueError, match="speed is of another model"):
        report.to_html(speed=tuned([layer("a.mlp", one)], one))


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_the_command_times_and_tells(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A neuron that is silent for a token need not be read. " * 40, encoding="utf-8")
    folder, html = tmp_path / "relu", tmp_path / "r.html"
    assert main(["patch", "tiny", "--output", str(folder)]) == 0
    options = ["--text-file", str(text), "--max-tokens", "128", "--sequence-length", "64"]
    assert main(["measure", str(folder), *options, "--speed", "--html", str(html)]) == 0
    page = Page(html.read_text(encoding="utf-8"))
    assert [row[0] for row in page.tables()[SHARES][1:]] == ["1", "2", "4", "8", "16", "32"]
    assert "choice, by tokens in a call" in capsys.readouterr().out
