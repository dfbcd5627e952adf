from __future__ import annotations

import pytest
import torch

import triton_ops
from support.compiler import needs_compiler
from triton_ops import DENSE, Problem, break_even, tune
from triton_ops.problem import Form

pytestmark = pytest.mark.usefixtures("own_cache")


def small(form: Form) -> Problem:
    return Problem(form, 16, 24, torch.float32, "cpu")


def result(
    dense: dict[int, float],
    sparse: dict[int, dict[float, float]],
    uncertified: dict[int, dict[float, float]] | None = None,
) -> tune.Measurement:
    return tune.Measurement(
        backend="torch",
        problem=Problem("gated", 8, 8, torch.float32, "cpu", uncertified is not None),
        dense_ms=dense,
        sparse_ms=sparse,
        uncertified_ms=uncertified or {},
    )


def test_break_even_is_the_density_below_which_skipping_never_loses():
    # At 0.5 it loses, so that it wins again at 1.0 must not count.
    assert result({1: 2.0}, {1: {0.1: 1.0, 0.2: 2.0, 0.5: 3.0, 1.0: 1.0}}).break_even == (0.2,)


def test_less_than_a_clock_can_tell_is_no_slower():
    assert result({1: 0.98}, {1: {0.5: 1.0}}).break_even == (0.5,)
    assert result({1: 0.96}, {1: {0.5: 1.0}}).break_even == (0.0,)


def test_counts_between_measured_ones_take_the_smaller_break_even():
    sparse = {1: {0.1: 1.0, 1.0: 1.0}, 4: {0.1: 1.0, 1.0: 9.0}, 6: {0.1: 9.0, 1.0: 9.0}}
    assert result(dict.fromkeys(sparse, 2.0), sparse).break_even == (1.0, 0.1, 0.1, 0.1, 0.0, 0.0)


def test_a_count_that_never_wins_between_two_that_do():
    sparse = {2: {0.1: 1.0}, 3: {0.1: 9.0}, 4: {0.1: 1.0}}
    # One token was not measured: no promise is made for it.
    assert result(dict.fromkeys(sparse, 2.0), sparse).break_even == (0.0, 0.1, 0.0, 0.1)


def test_a_certificate_must_beat_skipping_without_it_too():
    sparse, uncertified = {1: {0.1: 1.0, 0.5: 1.5, 1.0: 1.9}}, {1: {0.1: 1.2, 0.5: 1.5, 1.0: 1.8}}
    assert result({1: 2.0}, sparse, uncertified).break_even == (0.5,)


@pytest.mark.parametrize("form", ["gated", "plain", "linear"])
def test_a_measurement_is_printed_and_kept_for_later_choices(form):
    problem = small(form)
    measured = tune.measure(problem, backend="torch", tokens=(2, 1, 2), repeats=1, save=True)
    assert list(measured.dense_ms) == [1, 2]
    assert all(set(times) == set(tune.DENSITIES) for times in measured.sparse_ms.values())
    assert "torch, float32, 16 x 24" in str(measured)
    assert break_even.measured("torch", problem) == measured.break_even


@needs_compiler
@pytest.mark.parametrize("form", ["gated", "plain"])
def test_a_certificate_is_measured_for_one_token_and_kept_beside(form):
    problem = small(form)._replace(certified=True)
    measured = tune.measure(problem, backend="cpp", repeats=1)
    assert list(measured.sparse_ms) == list(measured.uncertified_ms) == [1]
    assert "uncertified / certified" in str(measured)
    assert break_even.measured("cpp", problem) == measured.break_even
    assert break_even.measured("cpp", small(form)) is None


@needs_compiler
def test_a_dense_product_is_measured_against_that_of_torch():
    problem = small("dense_linear")
    measured = tune.measure(problem, tokens=(1, 3), repeats=1)
    assert measured.backend == "cpp"
    assert all(set(times) == {1.0} for times in measured.sparse_ms.values())
    assert set(measured.break_even) <= {0.0, 1.0}
    assert "cpp, float32, 16 x 24, dense linear; dense by torch / by the backend" in str(measured)
    assert break_even.measured("cpp", problem) == measured.break_even
    assert break_even.measured("cpp", small("linear")) is None


@pytest.mark.parametrize("form", ["gated", "plain"])
def test_what_is_timed_has_the_density_that_it_says(form):
    (block, *_) = tune._blocks(Problem(form, 32, 500, torch.float32, "cpu"))
    for density in (0.05, 0.3, 1.0):
        seen = []
        operator = getattr(tune, f"{form}_mlp")

        def spy(x, first, *weights, operator=operator, seen=seen, **options):
            seen.append((x @ first.t() > options["threshold"]).float().mean().item())
            return operator(x, first, *weights, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, f"{form}_mlp", spy)
            block.sparse(4, density, "dense", False)()
        assert seen == [pytest.approx(density, abs=0.01)]


def test_a_measurement_below_the_built_in_size_is_followed():
    weight = torch.empty(24, 16)
    assert triton_ops.plan(weight, "gated").backend(1) == DENSE
    for name in ("cpp", "torch"):
        break_even.store(name, small("gated"), (1.0,))
    assert triton_ops.plan(weight, "gated").backend(1) != DENSE


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": ()}, ValueError, "tokens="),
        ({"tokens": (0, 2)}, ValueError, "tokens="),
        ({"problem": small("linear")._replace(certified=True)}, ValueError, "certified=True has no meaning"),
        (
            {"problem": small("dense_linear")._replace(certified=True)},
            ValueError,
            "certified=True has no meaning for form='dense_linear'",
        ),
        (
            {"problem": small("dense_linear"), "backend": "torch"},
            RuntimeError,
            "'torch' has no dense product of its own; cpp has",
        ),
        (
            {"problem": small("gated")._replace(certified=True), "backend": "torch"},
            RuntimeError,
            "'torch' has no use for a certificate; cpp and triton have",
        ),
    ],
)
def test_what_cannot_be_measured(options, error, message):
    with pytest.raises(error, match=message):
        tune.measure(**{"problem": small("gated"), **options})


def test_the_command_line_prints_and_stores(capsys, monkeypatch):
    command = ["tune", "--hidden", "16", "--neurons", "24", "--dtype", "float32", "--backend", "torch"]
    monkeypatch.setattr("sys.argv", [*command, "--form", "plain", "--tokens", "1", "3"])
    tune.main()
    assert "plain MLP; dense / sparse" in capsys.readouterr().out
    assert break_even.measured("torch", small("plain")) is not None


def test_nothing_to_measure_says_why():
    with pytest.raises(
        RuntimeError, match=r"nothing to measure for torch\.float64 on cpu: cpp: it has no kernel"
    ):
        tune.measure(Problem("gated", 8, 8, torch.float64, "cpu"))
