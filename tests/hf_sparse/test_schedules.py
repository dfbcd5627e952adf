from __future__ import annotations

import math

import pytest

from hf_sparse.schedules import LinearWarmup, SineStages, learning_rate_share, linear_mix

# ProSparse, LLaMA2-7B: Tables 6 and 7 of arXiv 2402.13516.
PROSPARSE_7B = SineStages((6000, 10000, 12000, 16000, 16500), (5e-3, 5e-2, 5e-2, 2e-1, 2e-1), start=5000)


def test_prosparse_is_zero_in_stage_0_and_constant_in_stage_1():
    assert PROSPARSE_7B.at(1) == PROSPARSE_7B.at(5000) == 0
    assert PROSPARSE_7B.at(5001) == PROSPARSE_7B.at(6000) == 5e-3


@pytest.mark.parametrize("step", [6001, 7000, 8000, 9999, 10000, 12001, 13000, 15999])
def test_prosparse_rises_by_the_published_formula(step):
    begin, end, low, high = (6000, 10000, 5e-3, 5e-2) if step <= 10000 else (12000, 16000, 5e-2, 2e-1)
    # An equivalent form: (sin(-pi/2 + x) + 1) / 2 = (1 - cos x) / 2.
    expected = low + (high - low) * (1 - math.cos(math.pi * (step - begin) / (end - begin))) / 2
    assert PROSPARSE_7B.at(step) == pytest.approx(expected, rel=1e-12)


def test_prosparse_reaches_its_targets_and_is_flat_between_equal_ones():
    for boundary, target in zip(PROSPARSE_7B.boundaries, PROSPARSE_7B.targets, strict=True):
        assert PROSPARSE_7B.at(boundary) == pytest.approx(target, rel=1e-12)
    assert PROSPARSE_7B.at(8000) == pytest.approx((5e-3 + 5e-2) / 2)
    assert {PROSPARSE_7B.at(s) for s in (10500, 11000, 12000)} == {5e-2}
    assert PROSPARSE_7B.at(16200) == PROSPARSE_7B.at(99999) == 2e-1


def test_prosparse_never_falls():
    values = [PROSPARSE_7B.at(step) for step in range(1, 17001, 7)]
    assert values == sorted(values)


def test_fractions_scale_to_steps():
    fractions = SineStages((0.5, 1.0), (1.0, 3.0), start=0.25)
    assert fractions.scaled(200).at(150) == pytest.approx(2.0)
    assert fractions.scaled(200).at(50) == 0
    assert fractions.scaled(200).at(51) == 1.0


def test_a_warm_up_is_off_then_linear_then_constant():
    # The comparison of arXiv 2603.23198: 5,000 steps off, 5,000 of warm-up, 3e-4.
    schedule = LinearWarmup(3e-4, length=0.25, start=0.25).scaled(20_000)
    assert [schedule.at(step) for step in (1, 5000)] == [0, 0]
    assert schedule.at(5001) == pytest.approx(3e-4 / 5000)
    assert schedule.at(7500) == pytest.approx(1.5e-4)
    assert {schedule.at(step) for step in (10_000, 15_000, 30_000)} == {3e-4}
    assert LinearWarmup(2e-5).at(1) == 2e-5


def test_no_stages_is_no_penalty():
    assert SineStages((), ()).at(10) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 2), (1,)), "boundaries has 2 values and targets 1"),
        (((2, 2), (1, 1)), "do not rise"),
        (((0.5,), (1,), 0.5), "do not rise"),
        (((1,), (-1,)), "negative coefficient"),
        (((1,), (math.nan,)), "not a finite number"),
        (((1,), (1,), -1), "start=-1"),
    ],
)
def test_bad_stages_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SineStages(*arguments)


def test_linear_mix():
    assert [linear_mix(s, 4) for s in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert linear_mix(1, 0) == 1.0


def test_learning_rate_rises_to_its_peak_and_falls_to_its_end():
    rates = [learning_rate_share(s, 100, warmup=10, final=0.1) for s in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert max(rates) == 1.0
    assert rates[54] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate_share(55, 100, warmup=10, decay="linear") == pytest.approx(0.5)
    assert learning_rate_share(99, 100, warmup=10, decay="constant") == 1.0


def test_inverse_square_root_is_that_of_t5_and_stays_above_the_final_share():
    def share(step: int, **options: object) -> float:
        return learning_rate_share(step, 100_000, decay="inverse_sqrt", **options)

    assert [share(n, warmup=10_000) for n in (5_000, 10_000, 40_000)] == pytest.approx([0.5, 1.0, 0.5])
    assert share(100_000, warmup=10_000) == pytest.approx(0.1**0.5)
    assert share(100_000, warmup=10_000, final=0.4) == 0.4
    assert share(100_001, warmup=10_000) == share(100_000, warmup=10_000)  # where the run went on
    assert [share(n) for n in (1, 4)] == [1.0, 0.5]


def test_an_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="cosine, linear, constant"):
        learning_rate_share(1, 2, decay="cosin")
