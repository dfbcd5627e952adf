"""Every row of the table of activations: its functions, and that all backends compute it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
    ("cats_silu", 0.25, 0.25, 0.0),
    ("cats_silu", 0.25, -0.5, 0.0),
    ("cats_silu", 0.25, -1.25, -0.27837518),  # the dip reaches below -0.25
    ("cats_silu", 0.25, -3.0, 0.0),
    ("cats_silu", 0.25, 2.0, 1.7615942),
    ("cats_silu", 0.0, -3.0, -0.14227763),
    ("cats_gelu", 0.1, -2.0, 0.0),
    ("cats_gelu", 0.1, -1.0, -0.15865526),
    ("cats_gelu", 0.1, 2.0, 1.9544997),
    ("cats_gelu_tanh", 0.1, -2.0, 0.0),
    ("cats_gelu_tanh", 0.1, -1.0, -0.15880801),
    ("cats_gelu_tanh", 0.1, 2.0, 1.9545977),
]


@pytest.mark.parametrize(("kind", "threshold", "p", "expected"), VALUES)
def test_activation_has_its_published_value(kind, threshold, p, expected):
    value = TABLE[kind].value(torch.tensor([p]), threshold).item()
    assert value == pytest.approx(expected, rel=1e-6, abs=0)


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
@pytest.mark.parametrize(("name", "gated"), [one for one in PARAMETRISED if TABLE[one[0]].certifiable])
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


OWN = {
    "cats_silu": F.silu,
    "cats_gelu": F.gelu,
    "cats_gelu_tanh": lambda p: F.gelu(p, approximate="tanh"),
}
# torch's GELU is 1 - 1 for large negative numbers, in float64 as well.
EXACT = {
    "cats_silu": F.silu,
    "cats_gelu": lambda p: p / 2 * torch.special.erfc(-p * 2**-0.5),
    "cats_gelu_tanh": lambda p: p * torch.sigmoid((8 / math.pi) ** 0.5 * (p + 0.044715 * p**3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("name", OWN)
def test_with_threshold_0_cats_is_the_own_activation_to_the_bit(name, dtype):
    p = torch.cat([points(name, dtype), torch.randn(1000).to(dtype) * 5])
    assert torch.equal(TABLE[name].value(p, 0.0), OWN[name](p))
    assert not TABLE[name].silent(p, 0.0).any()


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OWN)
def test_compiled_exponentials_are_right_to_rounding(name, dtype, tokens):
    p = torch.cat([torch.linspace(-12, 12, 601), torch.linspace(-0.01, 0.01, 21), torch.tensor([-90, 90])])
    p = p.to(dtype)
    eye = torch.eye(len(p), dtype=dtype)
    down = triton_ops.neuron_major_(eye.clone())
    with triton_ops.backend("cpp"):
        y = triton_ops.plain_mlp(p.expand(tokens, -1), eye, down, activation=name)
    exact = EXACT[name](p.double())
    # Half a unit of 16 bits, and some of float32, more where the exponent of the exponential is large. Below
    # 1e-30 some are 0, and float16 has subnormal numbers.
    exponent = -(exact / p.double()).nan_to_num(1.0).clamp(1e-30, 1.0).log()
    units = (dtype != torch.float32) * torch.finfo(dtype).eps / 2 + 3e-7 * (1 + exponent)
    smallest = 2.0**-25 if dtype == torch.float16 else 1e-30
    assert ((y[-1].double() - exact).abs() <= units * exact.abs() + smallest).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OWN)
def test_compiled_cats_zeroes_what_the_dense_computation_zeroes(name, dtype):
    # Thresholds between two pre-activations are decided alike; at the very value, within float32 rounding.
    p = torch.linspace(-4, 4, 333).to(dtype)
    eye = torch.eye(len(p), dtype=dtype)
    down = triton_ops.neuron_major_(eye.clone())
    for t in (0.0, 0.01, 0.1, 0.17, 0.25, 0.3, 1.0, 5.0):
        expected = TABLE[name].value(p, t) != 0
        with triton_ops.backend("cpp"):
            for tokens in (1, 40):
                x = p.expand(tokens, -1).contiguous()
                y = triton_ops.plain_mlp(x, eye, down, activation=name, threshold=t)
                assert torch.equal(y != 0, expected.expand(tokens, -1))


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
