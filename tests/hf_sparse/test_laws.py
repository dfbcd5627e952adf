"""Sparsing laws: the published curves, fits to synthetic points and to real logs, intervals, errors."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_log import RunLog

import hf_sparse
from hf_sparse.cli import main
from hf_sparse.laws import PUBLISHED, Curve, law_points

BILLIONS = [10 ** (0.3 + 0.25 * i) for i in range(10)]


def by_formula(form, alpha, c, b, limit, billions):
    """The law as it is printed."""
    if form == "relu":
        return math.exp(-c * billions**alpha + b) + limit
    return -c / billions**alpha + limit


def noisy(curve, deviation, seed, billions=BILLIONS):
    draw = random.Random(seed)
    return [(d * 1e9, min(1.0, max(0.0, curve(d * 1e9) + draw.gauss(0, deviation)))) for d in billions]


def test_the_papers_constants_give_the_papers_sparsity():
    # Printed: 93.52 % for the 2.4B ReLU model after about 800 billion tokens.
    assert 1 - PUBLISHED["relu", "2.4B"](800e9) == pytest.approx(0.9352, abs=1e-3)
    for (form, _), curve in PUBLISHED.items():  # printed: 6 to 8 % active with ReLU, 38 to 41 % with SiLU
        low, high = (0.06, 0.08) if form == "relu" else (0.38, 0.41)
        assert low < curve.limit < high


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_published_curve_is_the_printed_formula_and_is_found_again_from_points_on_it(key):
    curve = PUBLISHED[key]
    points = [(d * 1e9, by_formula(key[0], curve.alpha, curve.c, curve.b, curve.limit, d)) for d in BILLIONS]
    assert [curve(tokens) for tokens, _ in points] == pytest.approx([ratio for _, ratio in points], rel=1e-12)
    points = [point for point in points if 0 <= point[1] <= 1]
    law = hf_sparse.fit_sparsing_law(points)
    assert law.form == key[0]
    assert law.limit == pytest.approx(curve.limit, rel=1e-6)
    assert law.curve.alpha == pytest.approx(curve.alpha, rel=1e-4)
    assert law.curve.c == pytest.approx(curve.c, rel=1e-3)
    assert law.predict(5e12).ratio == pytest.approx(curve(5e12), abs=1e-6)
    low, high = law.intervals()["limit"]
    assert low == pytest.approx(high, abs=1e-6)  # without errors there is nothing to doubt


@settings(max_examples=10, deadline=None)
@given(
    form=st.sampled_from(["relu", "silu"]),
    alpha=st.floats(0.3, 1.2),
    half=st.floats(0.5, 1.5),
    height=st.floats(0.1, 0.5),
    limit=st.floats(0.05, 0.4),
)
def test_any_curve_with_a_bend_within_the_points_is_found_again(form, alpha, half, height, limit):
    middle = 10 ** (1.4 * half)  # billions of tokens at which the exponent is 1
    if form == "relu":
        curve = Curve(form=form, alpha=alpha, c=middle**-alpha, b=math.log(height), limit=limit)
    else:
        curve = Curve(form=form, alpha=alpha, c=height * BILLIONS[0] ** alpha, limit=limit + height)
    law = hf_sparse.fit_sparsing_law(noisy(curve, 0.0, 0))
    assert law.form == form
    assert law.limit == pytest.approx(curve.limit, abs=1e-4)
    assert law.curve.alpha == pytest.approx(alpha, rel=1e-3)


@pytest.mark.parametrize("key", [("relu", "0.8B"), ("silu", "0.4B")])
def test_the_intervals_cover_what_the_points_were_drawn_from(key):
    curve, trials, inside = PUBLISHED[key], 12, {"within": 0, "beyond": 0, "limit": 0}
    billions = BILLIONS if key[0] == "silu" else [d * 4 for d in BILLIONS]
    for seed in range(trials):
        law = hf_sparse.fit_sparsing_law(noisy(curve, 1e-3, seed, billions), form=key[0])
        last = law.points[-1][0]
        for name, tokens in (("within", law.points[4][0]), ("beyond", 20 * last)):
            found = law.predict(tokens)
            assert found.low <= found.high
            inside[name] += found.low <= curve(tokens) <= found.high
        low, high = law.intervals()["limit"]
        inside["limit"] += low <= curve.limit <= high
    assert all(count >= 0.8 * trials for count in inside.values()), inside  # of 95 %


def width(law):
    found = law.predict(1e13)
    return found.high - found.low


def test_more_points_and_less_confidence_narrow_the_interval():
    curve = PUBLISHED["silu", "0.4B"]
    runs = [noisy(curve, 2e-3, seed) for seed in range(6)]
    alone = [hf_sparse.fit_sparsing_law(run, form="silu") for run in runs]
    many = hf_sparse.fit_sparsing_law(*runs)
    less = hf_sparse.fit_sparsing_law(*runs, confidence=0.5)
    widths = [width(law) for law in (many, less)]
    assert sum(map(width, alone)) / len(alone) > widths[0] > widths[1]
    assert many.runs == 6
    assert many.predict(1e13).ratio == less.predict(1e13).ratio
    again = hf_sparse.fit_sparsing_law(*runs)
    assert torch.equal(many.draws, again.draws)


def test_a_power_law_is_told_as_one():
    points = [(d * 1e9, 0.5 * d**-0.3 + 0.1) for d in BILLIONS]
    law = hf_sparse.fit_sparsing_law(points)
    assert law.power_law
    assert "a power law fits as well" in str(law)
    assert law.predict(1e10).ratio == pytest.approx(0.5 * 10**-0.3 + 0.1, abs=1e-3)


CURVE = Curve(form="relu", alpha=0.6, c=40.0, b=-0.7, limit=0.2)  # bends within a million tokens


def write_log(folder, steps, every=50, tokens=2048, curve=CURVE):
    """A log as the trainer writes it: updates every 10 steps, evaluations every so many."""
    log = RunLog(folder, main=True, tensorboard=False)
    log.write("run", 0, {"recipe": {"max_steps": steps}})
    log.write("original", 0, {"loss": 4.0, "sparsity": 0.0, "tokens": 32768})
    log.write("eval", 0, {"loss": 9.0, "sparsity": 0.5, "tokens": 32768, "layers": {}})
    for step in range(1, steps + 1):
        if step % 10 == 0:
            log.write("train", step, {"loss": 3.0, "tokens": step * tokens, "sparsity": 0.25})
        if step % every == 0:
            sparsity = 1 - curve(step * tokens)
            log.write("eval", step, {"loss": 3.0, "sparsity": sparsity, "tokens": 32768, "layers": {}})
    log.close()
    return folder


def test_logs_are_read_with_the_tokens_trained_on_not_those_evaluated(tmp_path):
    folder = write_log(tmp_path / "run", 400, every=45)
    expected = [(step * 2048, pytest.approx(CURVE(step * 2048))) for step in range(45, 401, 45)]
    assert law_points(folder) == law_points(str(folder / "log.jsonl")) == expected
    assert law_points(folder, kind="train") == [(step * 2048, 0.75) for step in range(10, 401, 10)]
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "eval", "st')  # cut short by a crash
    other = write_log(tmp_path / "other", 400, every=25)
    law = hf_sparse.fit_sparsing_law(folder, other)
    assert law.runs == 2
    assert len(law.points) == 8 + 16
    assert law.limit == pytest.approx(CURVE.limit, rel=1e-3)
    assert law.predict(1e7).ratio == pytest.approx(CURVE(1e7), rel=1e-3)


def test_tables_of_results_are_read_run_by_run(tmp_path):
    rows = [{"step": step, "density": CURVE(step * 2048)} for step in range(50, 401, 50)]
    runs = [
        {"variant": name, "seed": 0, "evaluations": [{"step": 0, "density": 0.5}, *rows]} for name in "ab"
    ]
    table = {"fields": {"global_batch": 16, "sequence_length": 128}, "runs": runs}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(table))
    assert law_points(path, where={"variant": "a"}) == [
        (r["step"] * 2048, pytest.approx(r["density"])) for r in rows
    ]
    with pytest.raises(ValueError, match=r"holds 2 runs \(a, b\)"):
        law_points(path)
    with pytest.raises(ValueError, match="no run with"):
        law_points(path, where={"variant": "c"})


def test_the_command_prints_draws_and_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = write_log(tmp_path / "run", 400)
    plot, result = tmp_path / "law.png", tmp_path / "law.json"
    options = ["--tokens", "1e7", "--plot", str(plot), "--json", str(result)]
    assert main(["law", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    law = hf_sparse.fit_sparsing_law(folder)
    assert str(law) in printed
    assert str(law.predict(1e7)) in printed
    assert "12.2 times the tokens of the last point" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    kept = json.loads(result.read_text())
    assert kept == law.to_dict()
    assert kept["constants"]["limit"] == law.limit
    assert main(["law", str(tmp_path)]) == 2
    assert "has no log.jsonl" in capsys.readouterr().err


GOOD = [(d * 1e9, PUBLISHED["relu", "0.8B"](d * 1e9)) for d in BILLIONS]


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ((), {}, "no run was given"),
        (
            (GOOD[:4],),
            {"form": "relu"},
            "4 different token counts are too few for a law of 4 constants; give 5",
        ),
        ((GOOD[:3],), {}, "3 different token counts are too few"),
        (([GOOD[0]] * 9,), {}, "1 different token counts are too few"),
        (([*GOOD, (0, 0.5)],), {}, "tokens=0 is no positive number"),
        (([*GOOD, (-5.0, 0.5)],), {}, "tokens=-5 is no positive number"),
        (([*GOOD, (math.nan, 0.5)],), {}, "tokens=nan is no positive number"),
        (([*GOOD, (1e9, 1.5)],), {}, "ratio 1.5 at tokens=1e.09 is not in 0 to 1"),
        (([*GOOD, (1e9, math.nan)],), {}, "ratio nan at"),
        (([*GOOD, "x"],), {}, "'x' is no pair"),
        ((7,), {}, "a run is a path, or pairs"),
        ((GOOD,), {"form": "gelu"}, "form='gelu' is not known"),
        ((GOOD,), {"form": "silu"}, "which rises with tokens, is nearer to the points than a constant"),
        ((GOOD,), {"confidence": 1.0}, "confidence=1.0 is out of range"),
        ((GOOD,), {"kind": "test"}, "kind='test' is not known"),
        (([(t, 0.25) for t, _ in GOOD],), {}, "every activation ratio is 0.25"),
        (([(t, 0.5 if t < 9e9 else 0.2) for t, _ in GOOD],), {"form": "relu"}, "did not converge"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(runs, options, message):
    with pytest.raises(ValueError, match=message):
        hf_sparse.fit_sparsing_law(*runs, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "eval", "step": 5, "sparsity": 0.5}\n', "no records of the kind 'train'"),
        ('{"kind": "train", "step": 5, "tokens": 50}\n', "no records of the kind 'eval' after step 0"),
        ('x\n{"kind": "train", "step": 5, "tokens": 50}\n', "line 1 is no JSON"),
        ('{"step": 5}\n', "line 1 is no record of a log"),
        (
            '{"kind": "train", "step": 5, "tokens": 50}\n{"kind": "train", "step": 6, "tokens": 90}\n',
            "its steps are of 10.0 to 15.0 tokens",
        ),
        (
            '{"kind": "train", "step": 5, "tokens": 50}\n{"kind": "eval", "step": 5}\n',
            "a record lacks 'sparsity'",
        ),
        (
            '{"kind": "train", "step": 5, "tokens": 50}\n{"kind": "eval", "step": 5, "sparsity": null}\n',
            "the sparsity at step 5 is None",
        ),
    ],
)
def test_a_log_that_does_not_say_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        law_points(tmp_path)
    assert "log.jsonl" in str(caught.value)


def test_a_prediction_is_refused_where_the_law_does_not_hold():
    law = hf_sparse.fit_sparsing_law([(d * 1e9, PUBLISHED["silu", "0.4B"](d * 1e9)) for d in BILLIONS])
    with pytest.raises(ValueError, match="it does not hold so early"):
        law.predict(1e6)
    for wrong in (0, -1.0, math.inf, math.nan, "many", True):
        with pytest.raises(ValueError, match="no positive number of training tokens"):
            law.predict(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "gelu"}, "form='gelu'"),
        ({"b": None}, "b=None"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"c": -1.0}, "c=-1.0"),
        ({"limit": 1.5}, "limit=1.5"),
        ({"b": math.nan}, "b=nan"),
    ],
)
def test_constants_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Curve(**({"form": "relu", "alpha": 1.0, "c": 1.0, "b": 0.0, "limit": 0.1} | change))
