"""Every row of the table of activations: its functions, and that all backends compute it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triton_ops
from support.activations import GATED_OR_PLAIN, ON_CPU, PARAMETRISED, assert_bits_of_the_reference, points
from support.compiler import CPP, needs_compiler
from support.kernel_blocks import make_block, typical_threshold
from triton_ops.activations import TABLE, check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# kind, threshold, p, expected
VALUES = [
    ("relu", 0.0, -1.0, 0.0),
    ("relu", 0.0, 2.0, 2.0),
    ("relu2", 0.0, -3.0, 0.0),
    ("relu2", 0.0, 3.0, 9.0),
    ("jsrelu", 0.0, -1.0, 0.0),
    ("jsrelu", 0.0, 2.0, 4.0),
    ("jsrelu_linear", 0.0, -1.0, 0.0),
    ("jsrelu_linear", 0.0, 2.0, 4.0),
    ("jsrelu_linear", 0.0, 4.0, 12.0),
    ("jsrelu_linear", 0.0, 6.0, 22.0),
    ("shifted_relu", 0.5, 0.5, 0.0),
    ("shifted_relu", 0.5, 2.0, 1.5),
    ("shifted_relu", -1.0, -0.25, 0.75),
    ("fatrelu", 0.5, 0.25, 0.0),
    ("fatrelu", 0.5, 0.5, 0.5),
    ("fatrelu", 0.5, 2.0, 2.0),
    ("drelu", 0.0, -1.0, 0.0),
    ("drelu", 0.0, 2.0, 2.0),
]


@pytest.mark.parametrize(("kind", "threshold", "p", "expected"), VALUES)
def test_activation_has_its_published_value(kind, threshold, p, expected):
    assert TABLE[kind].value(torch.tensor([p]), threshold).item() == expected


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("name", TABLE)
def test_silent_is_where_the_value_is_zero(name, dtype):
    row, t, p = TABLE[name], typical_threshold(name), points(name, dtype)
    assert torch.equal(row.silent(p, t), row.value(p, t) == 0)
    assert row.silent(p, t).any()
    assert not row.silent(p, t).all()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("name", TABLE)
def test_nan_is_never_silent(name, dtype):
    row, p = TABLE[name], torch.tensor([math.nan], dtype=dtype)
    for t in {0.0, typical_threshold(name)}:
        assert not row.silent(p, t).any()
        assert row.value(p, t).isnan().all()


@pytest.mark.parametrize("name", TABLE)
def test_slope_is_what_autograd_computes(name):
    # The kinks themselves are among the points.
    row, t, p = TABLE[name], typical_threshold(name), points(name, torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(row.value(p, t).sum(), p)
    assert torch.equal(row.slope(p.detach(), t), slope)


@pytest.mark.parametrize("name", TABLE)
def test_slope_is_the_difference_quotient_away_from_kinks(name):
    row, t, p = TABLE[name], typical_threshold(name), points(name, torch.float64)
    p = p[((p - t).abs() > 1e-3) & (p.abs() > 1e-3)].requires_grad_()
    assert torch.autograd.gradcheck(lambda p: row.value(p, t), p)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.certifiable])
def test_below_a_silent_pre_activation_all_are_silent(name):
    p = points(name, torch.float64).sort().values
    silent = TABLE[name].silent(p, typical_threshold(name))
    assert torch.equal(silent, silent.sort(descending=True).values)


@pytest.mark.parametrize("path", ["dense", "torch", CPP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "gated"), GATED_OR_PLAIN)
def test_backends_have_the_bits_of_the_formula(name, gated, dtype, path):
    with triton_ops.backend(path):
        assert_bits_of_the_reference(name, gated, dtype, regimes=ON_CPU)


@pytest.mark.parametrize("path", ["dense", "torch", CPP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "gated"), PARAMETRISED)
def test_a_neuron_may_have_a_parameter_of_its_own(name, gated, dtype, path):
    with triton_ops.backend(path):
        assert_bits_of_the_reference(name, gated, dtype, regimes=ON_CPU, each=True)


@pytest.mark.parametrize("path", ["dense", "torch", CPP])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
@pytest.mark.parametrize(("name", "gated"), PARAMETRISED)
def test_one_parameter_for_all_is_the_same_for_each(name, gated, tokens, dtype, path):
    block = make_block(tokens, 33, 301, dtype, name, gated=gated, bias=True, certified=tokens == 1)
    block.threshold = 1 / 3
    with triton_ops.backend(path):
        expected = block.run(triton_ops)
        block.threshold = torch.full((602,), 1 / 3, dtype=dtype)[::2]
        assert torch.equal(block.run(triton_ops), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "gated"), PARAMETRISED)
def test_a_certificate_goes_by_the_parameter_of_each_neuron(name, gated, dtype):
    block = make_block(1, 200, 300, dtype, name, gated=gated)
    p = torch.nn.functional.linear(block.x, block.deciding)[0]
    far = torch.arange(300) % 3 > 0
    block.threshold = p.abs() + far.to(dtype)  # at or just above the pre-activation, or far above
    with triton_ops.backend("cpp"):
        expected = block.run(triton_ops)
        block.certified = True
        assert torch.equal(block.run(triton_ops), expected)
        certificate = triton_ops.certify(block.deciding)
        block.deciding[far] = math.nan  # not read
        operator = triton_ops.gated_mlp if gated else triton_ops.plain_mlp
        options = {"activation": name, "threshold": block.threshold, "certificate": certificate}
        assert torch.equal(operator(*block.tensors(), **options), expected)


@needs_compiler
@pytest.mark.parametrize("certifiable", [True, False])
def test_a_certificate_counts_only_for_what_it_can_speak_of(monkeypatch, certifiable):
    monkeypatch.setitem(TABLE, "relu", replace(TABLE["relu"], certifiable=certifiable))
    block = make_block(1, 16, 40, torch.float32)
    wrong = triton_ops.certify(-block.x.expand_as(block.gate))  # that every neuron is silent
    with triton_ops.backend("cpp"):
        y = triton_ops.gated_mlp(*block.tensors(), activation="relu", certificate=wrong)
    assert y.any() == (not certifiable)


def test_the_manual_has_every_row():
    manual = Path(__file__).parents[2].joinpath("docs/kernels.md").read_text()
    table = manual.split("| name | value | silent when |")[1].split("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines() if "`" in line] == list(TABLE)


@pytest.mark.parametrize(
    ("kind", "threshold", "gated", "message"),
    [
        ("silu", 0.0, True, "activation='silu' is not known; choose one of relu,"),
        ("relu", 0.5, True, "threshold=0.5 has no meaning for activation='relu'"),
        ("fatrelu", -0.5, True, "threshold=-0.5 is not valid for fatrelu"),
        ("fatrelu", math.nan, True, "threshold=nan is not valid for fatrelu; it is at least 0"),
        ("shifted_relu", math.nan, True, "threshold=nan is not valid for shifted_relu; it is a number"),
        ("drelu", 0.0, False, "activation='drelu' needs a gate"),
    ],
)
def test_errors_name_the_field_and_the_value(kind, threshold, gated, message):
    with pytest.raises(ValueError, match=message):
        check(kind, threshold, gated=gated)
