from __future__ import annotations

import pytest
import torch

import triton_ops
from triton_ops import break_even, dispatch, tune


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_SPARSE_CACHE", str(tmp_path))
    break_even.forget()
    dispatch.forget()
    yield
    break_even.forget()
    dispatch.forget()


def result(dense: dict[int, float], sparse: dict[int, dict[float, float]]) -> tune.Measurement:
    return tune.Measurement(
        backend="torch",
        hidden=8,
        neurons=8,
        dtype=torch.float32,
        gated=True,
        dense_ms=dense,
        sparse_ms=sparse,
    )


def test_break_even_is_the_density_below_which_skipping_never_loses():
    # At 0.5 it loses, so that it wins again at 1.0 must not count.
    assert result({1: 2.0}, {1: {0.1: 1.0, 0.2: 2.0, 0.5: 3.0, 1.0: 1.0}}).density == (0.2,)


def test_break_even_ends_at_the_first_token_count_that_never_wins():
    sparse = {1: {0.1: 1.0}, 2: {0.1: 9.0}, 3: {0.1: 1.0}}
    assert result({1: 2.0, 2: 2.0, 3: 2.0}, sparse).density == (0.1,)


@pytest.mark.parametrize("gated", [True, False])
def test_a_measurement_is_printed_and_kept_for_the_dispatch(gated):
    measured = tune.measure(
        16, 24, torch.float32, gated=gated, backend="torch", max_tokens=2, repeats=1, save=True
    )
    assert set(measured.dense_ms) == {1, 2}
    assert all(set(times) == set(tune.DENSITIES) for times in measured.sparse_ms.values())
    assert "torch, float32, 16 x 24" in str(measured)
    assert break_even.measured("torch", "cpu", torch.float32, 16, 24, gated) == measured.density


def test_the_dispatch_follows_a_measurement_below_the_built_in_size():
    small = torch.empty(24, 16)
    assert not triton_ops.wants_sparse(1, small, "gated")
    for name in ("cpp", "torch"):
        break_even.store(name, "cpu", torch.float32, 16, 24, True, (1.0,))
    dispatch.forget()
    assert triton_ops.wants_sparse(1, small, "gated")


def test_nothing_to_measure_says_why():
    with pytest.raises(
        RuntimeError, match=r"nothing to measure for torch\.float64 on cpu: cpp: it has no kernel"
    ):
        tune.measure(8, 8, torch.float64)
