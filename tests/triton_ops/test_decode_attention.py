"""The attention of one new token: against float64, and torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import triton_ops
from triton_ops.decode_attention import MOST

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """``[B, 1, H, V]`` in float64, by the formula."""
    key, value = (one.double().repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = query.double() @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)


def shaped(batch: int, heads: int, length: int, size: int, dtype: torch.dtype, *, rows_first: bool) -> Tensor:
    """``[B, heads, length, size]`` as a cache has it, or as a projection leaves it; of a larger buffer."""
    if rows_first:
        return torch.randn(batch, length, heads, size).to(dtype).transpose(1, 2)
    return torch.randn(batch, heads, length + 3, size).to(dtype)[:, :, :length]


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    keys=st.integers(1, 3),
    shared=st.sampled_from([1, 2, 3, 4, 7, MOST]),
    length=st.one_of(st.integers(1, 70), st.just(300)),
    size=st.sampled_from([1, 8, 17, 64, 80]),
    value_size=st.sampled_from([5, 16, 64]),
    kind=st.sampled_from(["none", "shown", "added"]),
    one_mask=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    rows_first=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_it_is_as_exact_as_torch(
    batch, keys, shared, length, size, value_size, kind, one_mask, scale, rows_first, dtype, seed
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(batch, 1, keys * shared, size).to(dtype).transpose(1, 2)
    key, value = (shaped(batch, keys, length, n, dtype, rows_first=rows_first) for n in (size, value_size))
    mask = None
    if kind != "none":
        shown = torch.rand(1 if one_mask else batch, 1, 1, length) < 0.7
        shown[..., 0] = True
        mask = (
            shown if kind == "shown" else torch.where(shown, torch.randn(shown.shape), -torch.inf).to(dtype)
        )
    with torch.no_grad():
        found = triton_ops.decode_attention(query, key, value, mask, scale=scale)
        torchs = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    wanted = exact(query, key, value, mask, scale)
    assert found.shape == (batch, 1, keys * shared, value_size)
    assert found.dtype == dtype
    assert found.is_contiguous()
    error = (torchs.transpose(1, 2).double() - wanted).abs().max()
    slack = torch.finfo(dtype).eps * wanted.abs().max() + 1e-6
    assert (found.double() - wanted).abs().max() <= 1.5 * error + slack


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_bits_do_not_depend_on_threads_or_other_sequences(dtype) -> None:
    query, key, value = (torch.randn(3, heads, n, 64).to(dtype) for heads, n in ((8, 1), (4, 900), (4, 900)))
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(2)
            two = triton_ops.decode_attention(query, key, value)
            torch.set_num_threads(1)
            one = triton_ops.decode_attention(query, key, value)
            alone = triton_ops.decode_attention(query[1:2], key[1:2], value[1:2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.equal(one[1:2], alone)


@torch.no_grad()
def test_what_is_not_seen_does_not_count() -> None:
    query, key, value = (torch.randn(2, heads, n, 16) for heads, n in ((4, 1), (2, 9), (2, 9)))
    shown = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    shown[0, ..., 4:] = False
    shown[1] = False
    key[0, :, 5] = torch.nan
    found = triton_ops.decode_attention(query, key, value, shown)
    torch.testing.assert_close(
        found[0], exact(query[:1], key[:1, :, :4], value[:1, :, :4], None, None)[0].float()
    )
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    key[0, :, 2] = torch.nan
    assert triton_ops.decode_attention(query, key, value, shown)[0].isnan().all()


def test_with_gradient_it_is_that_of_torch() -> None:
    query, key, value = (torch.randn(1, n, t, 8, requires_grad=True) for n, t in ((4, 1), (2, 5), (2, 5)))
    found = triton_ops.decode_attention(query, key, value)
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.sum(), (query, key, value)),
        torch.autograd.grad(wanted.sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_hidden_ends_hold_is_not_read(dtype) -> None:
    """Of a static cache what is not written, of a padded prompt the first tokens: the bits without."""
    query, key, value = (torch.randn(2, heads, n, 32).to(dtype) for heads, n in ((4, 1), (2, 300), (2, 300)))
    shown = torch.zeros(2, 1, 1, 300, dtype=torch.bool)
    shown[0, ..., 3:77], shown[1, ..., :5] = True, True
    for b, (begin, end) in enumerate([(3, 77), (0, 5)]):
        for one in (key, value):
            one[b, :, :begin], one[b, :, end:] = torch.nan, torch.nan
    with torch.no_grad():
        found = triton_ops.decode_attention(query, key, value, shown)
        for b, (begin, end) in enumerate([(3, 77), (0, 5)]):
            cut = (one[b : b + 1, :, begin:end] for one in (key, value))
            assert torch.equal(found[b : b + 1], triton_ops.decode_attention(query[b : b + 1], *cut))


@pytest.mark.parametrize("grad", [False, True])
def test_in_a_graph_it_is_an_operator(grad) -> None:
    torch._dynamo.reset()
    operators: list[object] = []

    def backend(graph, _):
        operators.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    query, key, value = (torch.randn(2, heads, n, 16) for heads, n in ((4, 1), (2, 9), (2, 9)))
    shown = torch.rand(2, 1, 1, 9) < 0.8
    shown[..., 0] = True
    with torch.set_grad_enabled(grad):
        found = torch.compile(triton_ops.decode_attention, backend=backend)(query, key, value, shown)
        expected = triton_ops.decode_attention(query, key, value, shown)
    assert torch.equal(found, expected)
    packet = torch.ops.hf_sparse.decode_attention
    assert bool({packet.default, packet.native} & {*operators}) != grad


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked) -> None:
    query, key, value = (torch.randn(2, heads, n, 16) for heads, n in ((4, 1), (2, 9), (2, 9)))
    mask = torch.randn(2, 1, 1, 9) if masked else None
    torch.library.opcheck(torch.ops.hf_sparse.decode_attention.default, (query, key, value, mask, 0.25))


@torch.no_grad()
@pytest.mark.parametrize("change", ["shared", "columns", "empty", "mask", "float64"])
def test_what_the_kernel_does_not_take_is_torchs(change) -> None:
    heads, length = (2 * MOST + 2 if change == "shared" else 4), 5
    query, key, value = (torch.randn(1, n, t, 8) for n, t in ((heads, 1), (2, length), (2, length)))
    mask = None
    if change == "columns":
        key = key.transpose(2, 3).contiguous().transpose(2, 3)
    elif change == "empty":
        query, key, value = (one[:0] for one in (query, key, value))
    elif change == "mask":
        mask = torch.ones(1, 1, 1, 2 * length, dtype=torch.bool)[..., ::2]
    elif change == "float64":
        query, key, value = (one.double() for one in (query, key, value))
    found = triton_ops.decode_attention(query, key, value, mask)
    wanted = exact(query, key, value, mask, None)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


def test_other_shapes_are_refused() -> None:
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"query has shape \[1, 4, 2, 8\]"):
        triton_ops.decode_attention(query, key, key)
    with pytest.raises(ValueError, match="H is a multiple of K"):
        triton_ops.decode_attention(query[:, :3, :1], key, key)
