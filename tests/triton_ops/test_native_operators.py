"""The operators in C++ for compiled graphs: the bits of those in Python, which get what they do not know."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import triton_ops
from support.activations import GATED_OR_PLAIN
from support.compiler import needs_compiler
from support.kernel_blocks import make_block
from triton_ops import AUTO, advice, layout
from triton_ops.activations import TABLE
from triton_ops.cpu import operators
from triton_ops.decode_attention import MOST
from triton_ops.int8 import INT8_TOKENS
from triton_ops.layout import stock_layout_

OPS = torch.ops.hf_sparse
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPP = "cpp"

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux" and not operators.are_there(), reason="built on Linux"),
]


def test_they_are_there() -> None:
    assert operators.are_there(), operators.library()


def called(call: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """What it gives, and whether Python of this package ran meanwhile."""
    files: set[str] = set()
    sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename))
    try:
        found = call()
    finally:
        sys.setprofile(None)
    return found, any(Path(triton_ops.__file__).parent in Path(file).parents for file in files)


def in_python(packet: Any, *args: Any) -> Tensor:
    return (packet.inference if "inference" in packet.overloads() else packet.default)(*args)


def assert_own(packet: Any, *args: Any) -> None:
    """The bits of Python, without it."""
    with torch.no_grad():
        found, python = called(lambda: packet.native(*args))
        expected = in_python(packet, *args)
    assert not python
    assert found.is_contiguous()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def assert_left(packet: Any, *args: Any) -> None:
    """The bits of Python, by Python."""
    with torch.no_grad():
        found, python = called(lambda: packet.native(*args))
        assert python
        assert torch.equal(found, in_python(packet, *args))


def spread(tensor: Tensor | None) -> Tensor | None:
    """The same values with a gap behind each."""
    return None if tensor is None else torch.stack([tensor, tensor], -1)[..., 0]


@settings(deadline=None)
@given(
    kind=st.sampled_from(GATED_OR_PLAIN),
    tokens=st.sampled_from([1, 2, 7, 8, 40]),
    hidden=st.sampled_from([1, 8, 65]),
    neurons=st.sampled_from([1, 12, 300]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    apart=st.booleans(),
    each=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_mlps(kind, tokens, hidden, neurons, dtype, bias, apart, each, seed) -> None:
    (activation, gated), _ = kind, torch.manual_seed(seed)
    block = make_block(tokens, hidden, neurons, dtype, activation, gated=gated, bias=bias)
    x, *weights = block.tensors()
    count = 3 if gated else 2
    weights, biases = weights[:count], weights[count:]
    if apart:
        x, biases = spread(x), [spread(one) for one in biases]
    each = each and TABLE[activation].parameter is not None
    threshold = torch.rand(neurons).to(dtype) if each else None
    scalar = 0.0 if each else block.threshold
    packet = OPS.gated_mlp if gated else OPS.plain_mlp
    assert_own(packet, x, *weights, *biases, None, None, threshold, None, activation, scalar, CPP)


@settings(deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (2, 3), (8,), (1, 1, 1)]),
    outputs=st.sampled_from([1, 7, 300]),
    inputs=st.sampled_from([1, 16, 129]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    layout=st.sampled_from(["rows", "columns", "rows apart"]),
    seed=st.integers(0, 1000),
)
def test_products(lead, outputs, inputs, dtype, bias, layout, seed) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(*lead, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    own = torch.randn(outputs).to(dtype) if bias else None
    if layout == "columns":
        triton_ops.neuron_major_(weight)
    if layout == "rows apart":
        weight = torch.cat([weight, weight], 1)[:, :inputs]
    assert_own(OPS.linear, x, weight, own, CPP)
    assert_own(OPS.sparse_linear, x.relu(), triton_ops.neuron_major_(weight.clone()), own, CPP)


@settings(deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (2, 3), (9,)]),
    outputs=st.lists(st.sampled_from([1, 7, 300]), min_size=1, max_size=5),
    inputs=st.sampled_from([1, 16, 129]),
    dtype=st.sampled_from(DTYPES),
    biases=st.integers(0, 31),
    columns=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_some_products_of_one_input(lead, outputs, inputs, dtype, biases, columns, seed) -> None:
    """Each is what it is alone, be it that all are made at once or not."""
    torch.manual_seed(seed)
    x = torch.randn(*lead, inputs).to(dtype)
    weights = [torch.randn(n, inputs).to(dtype) for n in outputs]
    own = [torch.randn(n).to(dtype) if biases >> i & 1 else None for i, n in enumerate(outputs)]
    if columns:
        triton_ops.neuron_major_(weights[-1])
    with torch.no_grad():
        found, python = called(lambda: OPS.linears.native(x, weights, own, CPP))
        assert python == (lead == (9,))  # more tokens than a kernel takes at once
        for y, weight, bias in zip(found, weights, own, strict=True):
            assert torch.equal(y, in_python(OPS.linear, x, weight, bias, CPP))


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    keys=st.integers(1, 3),
    shared=st.sampled_from([1, 3, MOST]),
    length=st.sampled_from([1, 5, 70]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(["none", "shown", "added", "one for all"]),
    seed=st.integers(0, 1000),
)
def test_attention(batch, keys, shared, length, dtype, mask, seed) -> None:
    torch.manual_seed(seed)
    query = torch.randn(batch, 1, keys * shared, 16).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, keys, length + 3, n).to(dtype)[:, :, :length] for n in (16, 24))
    seen = torch.rand(1 if mask == "one for all" else batch, 1, 1, length) < 0.7
    added = torch.where(seen, 0.5, -torch.inf).to(dtype)
    given = {"none": None, "added": added}.get(mask, seen)
    assert_own(OPS.decode_attention, query, key, value, given, 0.3)


def in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and scale."""
    scale = weight.float().abs().amax(1).clamp(min=1e-6) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@settings(deadline=None)
@given(
    kind=st.sampled_from(GATED_OR_PLAIN),
    tokens=st.sampled_from([1, 3, 8, INT8_TOKENS]),
    hidden=st.sampled_from([1, 8, 65]),
    neurons=st.sampled_from([1, 12, 300]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_int8(kind, tokens, hidden, neurons, dtype, bias, seed) -> None:
    (activation, gated), _ = kind, torch.manual_seed(seed)
    block = make_block(tokens, hidden, neurons, dtype, activation, gated=gated, bias=bias)
    up = in_int8(block.up)
    first, second = (in_int8(block.deciding), up) if gated else (up, (None, None))
    rows, scale = in_int8(block.down)
    down = triton_ops.neuron_major_(rows), scale
    biases = block.deciding_bias, block.up_bias if gated else None, block.down_bias
    args = *first, *second, *down, *biases, None, activation, block.threshold
    assert_own(OPS.int8_mlp, block.x, *args)
    h = torch.relu(torch.randn(tokens, neurons)).to(dtype)
    assert_own(OPS.int8_sparse_linear, h, *down, block.down_bias)
    assert_own(OPS.int8_linear, block.x[:8], *first, block.deciding_bias)


def gated(**changes: Any) -> list[Any]:
    """Arguments of ``gated_mlp``, which the operator in C++ takes, but for what is changed."""
    torch.manual_seed(0)
    block = make_block(2, 8, 12, torch.float32, bias=True)
    names = "x", "gate", "up", "down", "gate_bias", "up_bias", "down_bias"
    values = dict(zip(names, block.tensors(), strict=True))
    values |= {"q": None, "bounds": None, "thresholds": None, "stamp": None}
    values |= {"activation": "relu", "threshold": 0.0, "backend": CPP}
    return list((values | changes).values())


def linear(**changes: Any) -> list[Any]:
    values = {"x": torch.ones(2, 12), "weight": torch.ones(8, 12), "bias": None, "backend": CPP}
    return list((values | changes).values())


def attention(**changes: Any) -> list[Any]:
    values = {"query": torch.ones(2, 4, 1, 8), "key": torch.ones(2, 2, 5, 8), "value": torch.ones(2, 2, 5, 8)}
    return list((values | {"mask": None, "scale": 1.0} | changes).values())


def certificate() -> dict[str, Tensor]:
    gate = gated()[1]
    return dict(zip(("q", "bounds"), triton_ops.certify(gate), strict=True))


@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (OPS.gated_mlp, gated(backend="dense")),
        (OPS.gated_mlp, gated(backend="torch")),
        (OPS.gated_mlp, gated(backend=AUTO)),
        (OPS.gated_mlp, gated(x=torch.ones(0, 8))),
        (OPS.gated_mlp, gated(down=torch.ones(8, 12))),
        (OPS.gated_mlp, gated(gate=torch.ones(8, 12).t())),
        (OPS.gated_mlp, gated(x=torch.ones(1, 8), **certificate())),
        (OPS.linear, linear(backend="dense")),
        (OPS.linear, linear(x=torch.ones(9, 12))),
        (OPS.linear, linear(x=torch.ones(0, 12))),
        (OPS.linear, linear(weight=torch.ones(8, 12, 2)[..., 0])),
        (OPS.linear, [torch.ones(2, 12).double(), torch.ones(8, 12).double(), None, "dense"]),
        (OPS.sparse_linear, linear()),
        (OPS.int8_linear, [torch.ones(9, 12), *in_int8(torch.ones(8, 12)), None]),
        (OPS.int8_linear, [torch.ones(2, 12), *in_int8(torch.ones(8, 12).t().contiguous().t()), None]),
        (OPS.int8_sparse_linear, [torch.ones(2, 12), *in_int8(torch.ones(8, 12)), None]),
        (OPS.decode_attention, attention(mask=torch.ones(2, 1, 1, 10)[..., ::2])),
        (OPS.decode_attention, attention(key=torch.ones(2, 2, 8, 5).transpose(2, 3))),
        (OPS.decode_attention, attention(key=torch.ones(1, 2, 5, 8), value=torch.ones(1, 2, 5, 8))),
    ],
)
def test_what_it_does_not_know_python_computes(packet, args) -> None:
    assert_left(packet, *args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packet", "args"),
    [
        (OPS.gated_mlp, gated()),
        (OPS.gated_mlp, gated(x=torch.ones(1, 8), **certificate())),
        (OPS.plain_mlp, [*gated()[:1], *gated()[2:4], *[None] * 6, "relu", 0.0, CPP]),
        (OPS.linear, linear()),
        (
            OPS.linears,
            [torch.ones(2, 12), [torch.ones(8, 12), torch.ones(5, 12)], [None, torch.ones(5)], CPP],
        ),
        (OPS.sparse_linear, linear(weight=triton_ops.neuron_major_(torch.ones(8, 12)))),
        (OPS.decode_attention, attention()),
        (OPS.int8_linear, [torch.ones(2, 12), *in_int8(torch.ones(8, 12)), None]),
        (OPS.int8_sparse_linear, [torch.ones(2, 12), *in_int8(torch.ones(8, 12)), None]),
    ],
)
def test_opcheck(packet, args) -> None:
    torch.library.opcheck(packet.native, args)


@pytest.mark.parametrize(
    ("packet", "args", "message"),
    [
        (OPS.gated_mlp, gated(gate_bias=torch.ones(11)), "gate_bias has shape"),
        (OPS.gated_mlp, gated(up=torch.ones(12, 7)), "up has shape"),
        (OPS.gated_mlp, gated(down_bias=torch.ones(8).double()), "down_bias is torch.float64"),
        (OPS.gated_mlp, gated(activation="relu7"), "activation='relu7' is not known"),
        (OPS.gated_mlp, gated(x=torch.tensor(1.0)), "x has no dimension"),
        (OPS.linear, linear(weight=torch.ones(8, 12).half()), "weight is torch.float16"),
        (OPS.linear, linear(weight=torch.ones(8, 13)), "weight has shape"),
        (
            OPS.linears,
            [torch.ones(2, 12), [torch.ones(8, 12), torch.ones(8, 13)], [None] * 2, CPP],
            "has shape",
        ),
        (OPS.sparse_linear, linear(bias=torch.ones(3)), "bias has shape"),
        (OPS.int8_linear, [torch.ones(2, 12), *in_int8(torch.ones(8, 13)), None], "weight.rows is"),
        (OPS.int8_linear, [torch.ones(2, 12), *in_int8(torch.ones(8, 12).half()), torch.ones(7)], "bias has"),
    ],
)
def test_what_does_not_fit_python_refuses(packet, args, message) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        packet.native(*args)


class Adviser:
    """Who knows one weight."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.addresses = weight, weight.data_ptr().to_bytes(8, sys.byteorder)
        self.asked = 0

    def certificate(self, weight: Tensor) -> triton_ops.Certificate | None:
        self.asked += 1
        return triton_ops.certify(weight) if weight is self.weight else None

    def product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        self.asked += 1
        own = weight.data_ptr() == self.weight.data_ptr()
        return torch.full((len(x), len(weight)), 7.0) if own else None


def test_who_has_advice_is_asked_for_his_weights_and_no_others() -> None:
    args = gated(x=torch.ones(1, 8))
    gate, other = args[1], linear()
    (x, weight, *_), own = linear(), Adviser(gate)
    with torch.no_grad():
        expected = OPS.gated_mlp.native(*args)
        with advice.advised_by(own):
            assert torch.equal(OPS.gated_mlp.native(*args), expected)
            assert own.asked == 1
            OPS.linear.native(*other)
            assert own.asked == 1
            with advice.advised_by(Adviser(weight)):
                assert (OPS.linear.native(x, weight, None, CPP) == 7).all()
                others = OPS.linears.native(x, [weight + 1, weight], [None] * 2, CPP)
                assert [float(one[0, 0]) for one in others] == [24, 7]
                OPS.gated_mlp.native(*args)
                assert own.asked == 1
                found: list[tuple[Tensor, bool]] = []
                call = torch.no_grad()(lambda: OPS.linear.native(x, weight, None, CPP))
                thread = threading.Thread(target=lambda: found.append(called(call)))
                thread.start()
                thread.join()
                ((y, python),) = found  # of this thread alone
                assert (y == 12).all()
                assert not python
            OPS.gated_mlp.native(*args)
            assert own.asked == 2
        OPS.gated_mlp.native(*args)
        assert own.asked == 2


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (OPS.gated_mlp.inference, gated()),
        (OPS.gated_mlp.native, gated(backend="dense")),
        (OPS.plain_mlp.inference, [*gated()[:1], *gated()[2:4], *[None] * 6, "relu", 0.0, CPP]),
        (OPS.linear.inference, linear()),
        (OPS.sparse_linear.inference, linear()),
        (OPS.int8_sparse_linear.default, [torch.ones(2, 12), *in_int8(torch.ones(8, 12)), None]),
    ],
)
def test_python_takes_a_view_of_a_weight_whose_layout_may_change(operator, args) -> None:
    found: list[Tensor] = []
    call = torch.no_grad()(lambda: operator(*args))
    expected, thread = call(), threading.Thread(target=lambda: found.append(call()))
    with layout._changing:
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("change", [triton_ops.neuron_major_, stock_layout_])
def test_no_weight_is_looked_at_while_its_layout_changes(change) -> None:
    h, weight = torch.randn(1, 256).relu(), torch.randn(200, 256)
    if change is stock_layout_:
        triton_ops.neuron_major_(weight)
    call = torch.no_grad()(lambda: OPS.linear.native(h, weight, None, CPP))
    expected, strides, found = call(), weight.stride(), []
    threads = (
        threading.Thread(target=lambda: found.append(call())),
        threading.Thread(target=change, args=(weight,)),
    )
    with layout.unseen():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.3)
        assert all(thread.is_alive() for thread in threads)
        assert weight.stride() == strides
    for thread in threads:
        thread.join()
    assert weight.stride() != strides
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(call(), expected)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("overload", ["native", "inference"])
def test_a_forked_process_computes_too(overload) -> None:
    code = f"""
import os, signal, torch, triton_ops
from triton_ops.cpu import operators
torch.set_num_threads(2)
x, weight = torch.randn(1, 512), torch.randn(4096, 512)
operator = torch.ops.hf_sparse.linear
if "{overload}" == "native":
    assert operators.are_there()
expected = torch.no_grad()(operator.{overload})(x, weight, None, "cpp")
child = os.fork()
if not child:
    signal.alarm(60)
    assert operators.are_there()  # which are built before the fork, or here
    with torch.no_grad():
        os._exit(0 if torch.equal(operator.native(x, weight, None, "cpp"), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == "0"


GRAPH = """
import torch, triton_ops
from triton_ops.cpu import operators
{before}
x, weight = torch.randn(1, 64), torch.randn(128, 64)
seen = []
def keep(module, inputs):
    seen.extend(str(node.target) for node in module.graph.nodes if "hf_sparse" in str(node.target))
    return module.forward
call = torch.compile(lambda x: triton_ops.linear(x, weight, backend="cpp"), backend=keep, fullgraph=True)
with torch.no_grad():
    torch.testing.assert_close(call(x), x @ weight.t())
print(*seen)
"""


def test_graphs_call_it() -> None:
    assert run(GRAPH.format(before="")) == "hf_sparse.linear.native"


def test_where_it_cannot_be_built_graphs_call_python() -> None:
    before = "operators.COMPILE = (*operators.COMPILE, '-include', 'no-such-header.h')"
    assert run(GRAPH.format(before=before)) == "hf_sparse.linear.inference"
