"""``triton_ops.linear``: the numbers of ``F.linear``, no less exact, in every layout and use of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import triton_ops
from support.backends import change_backend
from support.compiler import CPP, needs_compiler
from support.pairs import pairs
from triton_ops import AUTO, DENSE, Problem, break_even
from triton_ops.backends import REGISTRY
from triton_ops.cpu import products
from triton_ops.cpu.backend import FEW
from triton_ops.dense_linear import quick

OPERATOR = torch.ops.hf_sparse.linear.default
PATHS = [DENSE, "torch", CPP]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["rows", "columns", "rows apart", "columns apart", "neither"]
# tokens, outputs, inputs: ones, primes, tails of every vector width, more than one piece and block of rows
SHAPES = [
    (1, 1, 1),
    (1, 7, 5),
    (2, 63, 1),
    (3, 1, 172),
    (4, 172, 63),
    (5, 300, 129),
    (8, 65, 1000),
    (9, 33, 64),
]


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same values in other places; those apart start at an odd element, too."""
    outputs, inputs = weight.shape
    if layout == "columns":
        return triton_ops.neuron_major_(weight.clone())
    if layout == "rows apart":
        wide = weight.new_full((outputs, inputs + 3), math.nan)
        wide[:, 1 : inputs + 1] = weight
        return wide[:, 1 : inputs + 1]
    if layout == "columns apart":
        return laid_out(weight.t(), "rows apart").t()
    if layout == "neither":
        wide = weight.new_full((outputs, inputs, 2), math.nan)
        wide[..., 1] = weight
        return wide[..., 1]
    return weight


def make(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, layout: str = "rows", *, biased: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    return torch.randn(tokens, inputs).to(dtype), laid_out(weight, layout), bias


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_right(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within one rounding of the result, and those of a float32 sum of its terms in any order."""
    exact = F.linear(*double(x, weight, bias))
    terms = F.linear(*(None if t is None else t.abs() for t in double(x, weight, bias)))
    eps, eps32 = torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps
    subnormal = eps * torch.finfo(y.dtype).smallest_normal
    # torch's own products add up to as many terms as there are in a row, the bias among them.
    allowed = eps * exact.abs() + (weight.shape[1] + 1) * eps32 * terms + subnormal
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert y.is_contiguous()
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of each call that reached the compiled backend."""
    seen: list[int] = []
    run = REGISTRY["cpp"].linear
    assert run is not None

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.numel() // weight.shape[1])
        return run(x, weight, bias)

    change_backend(monkeypatch, "cpp", linear=counting)
    yield seen
    monkeypatch.undo()
    triton_ops.forget()


@torch.no_grad()
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "biased"), pairs(SHAPES, DTYPES, LAYOUTS, [False, True])
)
def test_against_float64(path, shape, dtype, layout, biased):
    x, weight, bias = make(*shape, dtype, layout, biased=biased)
    with triton_ops.backend(path):
        assert_right(triton_ops.linear(x, weight, bias), x, weight, bias)


@needs_compiler
@settings(max_examples=settings.default.max_examples * 2, deadline=None)
@given(
    tokens=st.integers(0, FEW + 3),
    outputs=st.integers(0, 140) | st.integers(141, 1500),
    inputs=st.integers(0, 140) | st.integers(141, 700) | st.sampled_from([1024, 2050, 4096, 4097, 8200]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    biased=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(tokens, outputs, inputs, dtype, layout, biased, strided, seed):
    torch.manual_seed(seed)
    outputs = min(outputs, 100_000 // max(inputs, 1))
    x, weight, bias = make(tokens, outputs, max(inputs, 1), dtype, layout, biased=biased)
    x, weight = x[:, :inputs], weight[:, :inputs]
    if strided:
        x, bias = x.t().contiguous().t(), None if bias is None else bias.repeat_interleave(2)[::2]
    with torch.no_grad(), triton_ops.backend("cpp"):
        y = triton_ops.linear(x, weight, bias)
    assert_right(y, x, weight, bias)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("inputs", [300, 2100, 9000])
def test_errors_are_no_larger_than_those_of_torch(dtype, layout, tokens, inputs):
    ours = theirs = 0.0
    for _ in range(4):
        x, weight, bias = make(tokens, 100, inputs, dtype, layout)
        exact = F.linear(*double(x, weight, bias))
        with triton_ops.backend("cpp"):
            ours += (triton_ops.linear(x, weight, bias).double() - exact).square().sum().item()
        theirs += (F.linear(x, weight, bias).double() - exact).square().sum().item()
    # In 16 bits it is the rounding of the result that counts, and is the same for both but for few.
    assert ours <= theirs * 1.02


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_nan_and_infinity_come_through_as_in_torch(dtype, layout, tokens):
    x, weight, bias = make(tokens, 70, 77, dtype, layout)
    x[0, 3], x[0, 76] = 0, math.inf
    x[-1, 5] = 0
    weight[2, 3], weight[7, 5] = math.inf, math.nan  # times 0: NaN
    weight[9, 76] = -math.inf
    bias[11], bias[12] = math.nan, -math.inf
    with triton_ops.backend("cpp"):
        y = triton_ops.linear(x, weight, bias)
    exact = F.linear(*double(x, weight, bias))
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y == math.inf, exact == math.inf)
    assert torch.equal(y == -math.inf, exact == -math.inf)
    assert exact.isinf().any()
    assert exact[0, 2].isnan()


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_overflow_gives_infinity_and_sums_do_not_overflow_on_the_way_in_float16(dtype, layout):
    large = torch.finfo(dtype).max
    x = torch.tensor([[large, large / 2, -large / 2, -large / 2]]).to(dtype)
    weight = laid_out(torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [-1, -1, 0, 0]]).to(dtype), layout)
    with triton_ops.backend("cpp"):
        y = triton_ops.linear(x, weight)
    assert y[0, [0, 2]].tolist() == [math.inf, -math.inf]
    if dtype == torch.float16:
        assert y[0, 1] == pytest.approx(large / 2, rel=1e-3)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_same_bits_on_any_number_of_threads_and_beside_any_tokens(dtype, layout):
    x, weight, bias = make(FEW, 1500, 270, dtype, layout)
    before = torch.get_num_threads()
    try:
        with triton_ops.backend("cpp"):
            whole = triton_ops.linear(x, weight, bias)
            for threads in (1, 2, 3, 4, 7):
                torch.set_num_threads(threads)
                for begin, end in ((0, 8), (0, 1), (7, 8), (1, 3), (2, 5), (0, 4), (1, 6), (1, 8)):
                    some = triton_ops.linear(x[begin:end], weight, bias)
                    assert torch.equal(some, whole[begin:end])
    finally:
        torch.set_num_threads(before)


@needs_compiler
@torch.no_grad()
def test_more_tokens_are_those_of_torch():
    x, weight, bias = make(FEW + 1, 40, 300, torch.float32)
    with triton_ops.backend("cpp"):
        assert torch.equal(triton_ops.linear(x, weight, bias), F.linear(x, weight, bias))
        assert not torch.equal(triton_ops.linear(x[:FEW], weight, bias), F.linear(x[:FEW], weight, bias))


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_where_torch_has_no_arithmetic_more_tokens_are_products_of_a_few(layout, monkeypatch):
    monkeypatch.setattr(products, "has_own", lambda dtype: dtype != torch.bfloat16)
    triton_ops.forget()
    tokens = 3 * FEW + 2
    x, weight, bias = make(tokens, 700, 300, torch.bfloat16, layout)
    try:
        assert triton_ops.plan(weight, "dense_linear").backend(tokens) == "cpp"
        assert quick(x, weight, bias) is not None
        y = triton_ops.linear(x.view(2, -1, 300), weight, bias).view(tokens, -1)
        assert triton_ops.plan(weight.float(), "dense_linear").backend(tokens) == "dense"
        monkeypatch.setattr(products, "has_own", lambda dtype: True)
        triton_ops.forget()
        assert triton_ops.plan(weight, "dense_linear").backend(tokens) == "dense"
        assert quick(x, weight, bias) is None
    finally:
        monkeypatch.undo()
        triton_ops.forget()
    each = [triton_ops.linear(x[t : t + 1], weight, bias, backend="cpp") for t in range(tokens)]
    assert torch.equal(y, torch.cat(each))


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (1, 1, 40), (2, 3, 40), (3, 2, 2, 40)])
def test_leading_dimensions(path, shape):
    x, (_, weight, bias) = torch.randn(shape), make(1, 50, 40, torch.float32)
    with triton_ops.backend(path):
        y = triton_ops.linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_views_of_all_kinds(path):
    x, weight, bias = make(4, 12, 40, torch.float32)
    cases = [
        (x.expand(2, 4, 40), weight[:1].expand(12, 40), bias[:1].expand(12)),
        (x[:, :1].expand(4, 40), weight[:, :1].expand(12, 40), bias),
        (x.view(2, 2, 40).transpose(0, 1), weight[::2], bias[::2]),
        (x[:, ::2], weight[:, ::2], bias),
        (torch.randn(40, 4).t(), torch.randn(40, 12).t()[3:], bias[3:]),
    ]
    with triton_ops.backend(path):
        for case in cases:
            torch.testing.assert_close(triton_ops.linear(*case), F.linear(*case))


# What it is to torch.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "grad", "layout"),
    pairs(["dense", "torch", CPP], [False, True], ["rows", "columns", "neither"]),
)
def test_opcheck(backend, grad, layout):
    x, weight, bias = make(6, 8, 12, torch.float32, layout)
    x = x.view(2, 3, 12)
    x, weight, bias = (t.detach().requires_grad_(grad) for t in (x, weight, bias))
    with triton_ops.backend(backend):
        torch.library.opcheck(OPERATOR, (x, weight, bias, AUTO))
        torch.library.opcheck(OPERATOR, (x, weight, None, AUTO))
        if not grad:
            torch.library.opcheck(OPERATOR.overloadpacket.inference, (x, weight, bias, AUTO))


@pytest.mark.parametrize("backend", [AUTO, "dense", CPP])
def test_with_gradient_it_is_torch_bit_for_bit(backend):
    x, weight, bias = (t.requires_grad_() for t in make(3, 8, 12, torch.float32))
    with triton_ops.backend(backend):
        y = triton_ops.linear(x, weight, bias)
        grads = torch.autograd.grad(y.square().sum(), (x, weight, bias), create_graph=True)
    expected = F.linear(x, weight, bias)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.square().sum(), (x, weight, bias))))
    assert all(g.requires_grad for g in grads)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 2, 6), (0, 6)])
def test_gradients_of_the_operator_itself(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (4,)))
    call = lambda *tensors: OPERATOR(*tensors, DENSE)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_torch(dtype):
    x, weight, bias = make(2, 8, 12, dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), triton_ops.backend("cpp"):
        y = triton_ops.linear(x, weight.float(), bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x, weight.float(), bias))


@pytest.mark.parametrize("backend", [DENSE, CPP])
def test_forward_mode_derivatives(backend):
    x, weight, bias = make(2, 8, 12, torch.float32)
    with torch.no_grad(), triton_ops.backend(backend), forward_ad.dual_level():
        y = triton_ops.linear(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, weight.sum(1).expand(2, -1))


@needs_compiler
def test_transforms_of_functions():
    x, weight, bias = make(3, 8, 12, torch.float32)
    weights = torch.stack([weight, -weight, 2 * weight])
    biases = torch.stack([bias, bias + 1, -bias])
    cases = [
        ((0, None, None), (x.view(3, 1, 12), weight, bias)),
        ((1, None, None), (x.t().contiguous(), weight, bias)),
        ((None, 0, None), (x, weights, bias)),
        ((0, 2, 1), (x, weights.permute(1, 2, 0), biases.t())),
        ((None, None, 0), (x, weight, biases)),
    ]
    with triton_ops.backend("cpp"):
        for dims, case in cases:
            y = torch.vmap(triton_ops.linear, in_dims=dims)(*case)
            torch.testing.assert_close(y, torch.vmap(F.linear, in_dims=dims)(*case))
        loss, expected = (
            lambda w, call=call: call(x, w, bias).square().sum() for call in (triton_ops.linear, F.linear)
        )
        torch.testing.assert_close(torch.func.grad(loss)(weight), torch.func.grad(expected)(weight))
        torch.testing.assert_close(
            torch.func.hessian(loss)(weight[:2, :3].clone().new_zeros(8, 12)),
            torch.func.hessian(expected)(torch.zeros(8, 12)),
        )


@needs_compiler
@torch.no_grad()
def test_it_leaves_tensor_subclasses_to_torch():
    class Doubled(Tensor):
        """A weight that stands for twice its values, as a quantised one for others."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func is F.linear
            x, weight, bias = args
            return F.linear(x, 2 * weight.as_subclass(Tensor), bias)

    x, weight, bias = make(2, 8, 12, torch.float32)
    with triton_ops.backend("cpp"):
        y = triton_ops.linear(x, weight.as_subclass(Doubled), bias)
    assert torch.equal(y, F.linear(x, 2 * weight, bias))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_graph_breaks(dynamic, kernel_calls):
    torch.compiler.reset()
    layer = torch.nn.Linear(40, 24)

    def call(x: Tensor) -> Tensor:
        return triton_ops.linear(x * 2, layer.weight, layer.bias) + 1

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    with triton_ops.backend("cpp"):
        with torch.no_grad():
            for tokens in (1, 3, 20):
                x = torch.randn(2, tokens, 40)
                torch.testing.assert_close(compiled(x), F.linear(x * 2, layer.weight, layer.bias) + 1)
        assert kernel_calls == [2, 6, 40]
        compiled(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 40.0))


@torch.no_grad()
def test_meta_tensors_give_a_shape():
    y = triton_ops.linear(*(t.to("meta") for t in make(2, 8, 12, torch.bfloat16)))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 11)}, r"weight has shape \[8, 11\]; expected \[D, F\] = \[8, 12\]"),
        ({"weight": torch.zeros(12)}, r"weight has shape \[12\]; expected two dimensions"),
        ({"bias": torch.zeros(12)}, r"bias has shape \[12\]; expected \[D\] = \[8\]"),
        ({"x": torch.zeros(())}, "x has no dimension"),
        ({"x": torch.zeros(1, 12, dtype=torch.int64)}, "x is torch.int64; expected a floating dtype"),
        ({"weight": torch.zeros(8, 12).double()}, "weight is torch.float64 and the input is torch.float32"),
        ({"bias": torch.zeros(8).half()}, "bias is torch.float16 and the input is torch.float32"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta and the input is on cpu"),
    ],
)
@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("backend", [AUTO, CPP])
def test_errors(backend, grad_mode, change, message):
    given = dict(zip(("x", "weight", "bias"), make(1, 8, 12, torch.float32), strict=True)) | change
    with (
        torch.set_grad_enabled(grad_mode),
        triton_ops.backend(backend),
        pytest.raises(ValueError, match=message),
    ):
        triton_ops.linear(**given)


def test_an_unknown_backend_and_a_dtype_without_a_kernel_are_refused():
    case = make(1, 8, 12, torch.float64)
    with torch.no_grad():
        with pytest.raises(ValueError, match="backend='fast' is not a backend; choose one of"):
            triton_ops.linear(*case, backend="fast")
        with pytest.raises(RuntimeError, match=r"'torch' was forced but cannot run here: .*torch.float64"):
            triton_ops.linear(*case, backend="torch")
        assert torch.equal(triton_ops.linear(*case), F.linear(*case))


# Who multiplies.


@needs_compiler
@torch.no_grad()
@pytest.mark.usefixtures("own_cache")
def test_the_choice_is_by_size_and_number_of_tokens(kernel_calls):
    large, small = torch.randn(700, 400), torch.randn(60, 400)
    x = torch.randn(5, 400)
    for tokens in (1, 4, 5):
        triton_ops.linear(x[:tokens], large)
        triton_ops.linear(x[:tokens], small)
    assert kernel_calls == [1, 4]
    with triton_ops.backend("cpp"):
        triton_ops.linear(x, small)
    with triton_ops.backend("dense"):
        triton_ops.linear(x[:1], large)
    assert kernel_calls == [1, 4, 5]


@needs_compiler
@torch.no_grad()
@pytest.mark.usefixtures("own_cache")
def test_what_was_measured_is_chosen(kernel_calls):
    weight, x = torch.randn(60, 400), torch.randn(8, 400)
    break_even.store("cpp", Problem("dense_linear", 60, 400, torch.float32, "cpu"), (0.0, 1.0, 1.0))
    # Of the sparse operator with a weight of the same size it says nothing, nor the other way round.
    break_even.store("cpp", Problem("linear", 60, 400, torch.float32, "cpu"), (1.0,) * 8)
    for tokens in range(1, 9):
        triton_ops.linear(x[:tokens], weight)
    assert kernel_calls == [2, 3]
    plan = triton_ops.plan(weight, "dense_linear")
    assert [plan.backend(tokens) for tokens in (1, 2, 3, 4, 100)] == [DENSE, "cpp", "cpp", DENSE, DENSE]


@torch.no_grad()
@pytest.mark.usefixtures("own_cache")
def test_backends_without_a_kernel_are_passed_over(monkeypatch):
    change_backend(monkeypatch, "cpp", unusable=lambda device: "no compiler")
    case = make(1, 700, 400, torch.float32)
    assert triton_ops.plan(case[1], "dense_linear").backend(1) == DENSE
    assert torch.equal(triton_ops.linear(*case), F.linear(*case))
    monkeypatch.undo()
    triton_ops.forget()
