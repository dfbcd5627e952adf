"""A mixture of experts as one operator, against the same in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import triton_ops
from support.activations import CUTTING, GATED_OR_PLAIN
from support.compiler import CPP
from support.kernel_blocks import typical_threshold
from support.pairs import pairs
from triton_ops import reference

OPERATOR = torch.ops.hf_sparse.routed_mlp.default


def mixture(tokens=7, count=5, slots=2, hidden=19, neurons=33, dtype=torch.float32, gated=True, bias=False):
    """The arguments of ``routed_mlp``; expert 1 is never chosen."""

    def rand(*shape, fan_in=1):
        return (torch.randn(*shape) * fan_in**-0.5).to(dtype)

    first, up = (rand(count, neurons, hidden, fan_in=hidden) for _ in range(2))
    experts = torch.randint(0, count - 1, (tokens, slots))
    return [
        rand(tokens, hidden),
        torch.where(experts >= 1, experts + 1, experts),
        torch.rand(tokens, slots).to(dtype),
        first,
        up if gated else None,
        triton_ops.neuron_major_(rand(count, hidden, neurons, fan_in=neurons)),
        rand(count, neurons) if bias else None,
        rand(count, neurons) if bias and gated else None,
        rand(count, hidden) if bias else None,
    ]


def in_float64(arguments):
    return [t.double() if t is not None and t.is_floating_point() else t for t in arguments]


@pytest.mark.parametrize(
    ("backend", "activation", "dtype", "bias", "tokens"),
    pairs(
        ["dense", "torch", CPP],
        GATED_OR_PLAIN,
        [torch.float32, torch.bfloat16, torch.float16],
        [False, True],
        [0, 1, 2, 40],
    ),
)
def test_it_is_as_exact_as_dense(backend, activation, dtype, bias, tokens) -> None:
    name, gated = activation
    arguments = mixture(tokens, dtype=dtype, gated=gated, bias=bias)
    options = {"activation": name, "threshold": typical_threshold(name)}
    exact = reference.routed_mlp(*in_float64(arguments), **options)
    dense = reference.routed_mlp(*arguments, **options)
    with triton_ops.backend(backend):
        y = triton_ops.routed_mlp(*arguments, **options)
    assert y.dtype == dtype
    assert y.shape == arguments[0].shape
    if tokens and name not in CUTTING:  # either side of its jump is a correct rounding
        eps = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
        allowed = 2 * (dense.double() - exact).abs().max() + 2 * eps * exact.abs().max()
        assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("backend", ["dense", CPP])
def test_numbers_beyond_the_experts_add_nothing_and_one_may_be_chosen_twice(backend) -> None:
    arguments = mixture(3)
    arguments[1] = torch.tensor([[0, 5], [9, 5], [2, 2]])
    with triton_ops.backend(backend):
        y = triton_ops.routed_mlp(*arguments, activation="relu")
    x, _, weights, first, up, down, *_ = arguments
    once = [
        reference.gated_mlp(x[t], first[e], up[e], down[e], activation="relu") for t, e in ((0, 0), (2, 2))
    ]
    torch.testing.assert_close(y[0], once[0] * weights[0, 0])
    assert not y[1].any()
    torch.testing.assert_close(y[2], once[1] * weights[2].sum())


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_the_formula(gated) -> None:
    arguments = in_float64(mixture(3, hidden=4, neurons=6, gated=gated, bias=True))
    for t in arguments:
        if t is not None and t.is_floating_point():
            t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: triton_ops.routed_mlp(*given, activation="jsrelu"), arguments
    )


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["dense", CPP])
def test_it_passes_opcheck(backend, gated) -> None:
    torch.library.opcheck(OPERATOR, (*mixture(gated=gated, bias=True), "relu", 0.0, backend))


def test_autocast_computes_as_torch_does() -> None:
    arguments = mixture()
    with torch.autocast("cpu", torch.bfloat16):
        y = triton_ops.routed_mlp(*arguments, activation="relu")
        expected = reference.routed_mlp(*arguments, activation="relu")
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(2, 7, 19), r"x has shape \[2, 7, 19\]"),
        (1, torch.zeros(7, 2), r"experts is torch.float32 \[7, 2\]; expected int64 \[T, k\] with T = 7"),
        (1, torch.zeros(6, 2, dtype=torch.int64), r"experts is torch.int64 \[6, 2\]"),
        (2, torch.randn(7, 3), r"weights is torch.float32 \[7, 3\]; expected floating numbers, \[7, 2\]"),
        (3, torch.randn(5, 33, 18), r"gate has shape \[5, 33, 18\]; expected \[E, F, D\] = \[5, 33, 19\]"),
        (5, torch.randn(4, 19, 33), r"down has shape \[4, 19, 33\]; expected \[E, D, F\] = \[5, 19, 33\]"),
        (5, torch.randn(5, 19, 33).double(), r"down is torch.float64 and the input is torch.float32"),
        (8, torch.randn(5, 18), r"down_bias has shape \[5, 18\]; expected \[E, D\] = \[5, 19\]"),
    ],
)
def test_what_does_not_fit_is_named(place, value, message) -> None:
    arguments = mixture()
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        triton_ops.routed_mlp(*arguments, activation="relu")
