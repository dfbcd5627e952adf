"""MLPs that skip in training by the Triton kernels: on a GPU, or in the interpreter (see conftest.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import triton_ops
from support.activations import GATED_OR_PLAIN
from support.kernel_blocks import DEVICE, make_block
from support.pairs import pairs
from support.passes import assert_as_exact, dense, passes, skipping

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 17, 5), (20, 150, 40)]


@pytest.fixture(autouse=True)
def _triton():
    with triton_ops.backend("triton"):
        yield


@pytest.mark.parametrize(
    ("dtype", "shape", "kind", "bias"),
    pairs(DTYPES, SHAPES, GATED_OR_PLAIN, [False, True]),
    ids=lambda value: str(value).replace(" ", ""),
)
def test_any_shape(dtype, shape, kind, bias):
    activation, gated = kind
    assert_as_exact(make_block(*shape, dtype, activation, gated=gated, bias=bias, device=DEVICE))


def test_nothing_active():
    block = make_block(9, 16, 32, torch.float32, "shifted_relu", bias=True, device=DEVICE)
    own = passes(replace(block, threshold=1e9), skipping)
    assert torch.equal(own.y, block.down_bias.expand(9, 16))
    assert not any(grad.any() for grad in own.grads[:-1])


def test_unasked_it_is_dense():
    block = make_block(9, 16, 32, torch.float32, device=DEVICE)
    with triton_ops.backend("auto" if DEVICE == "cuda" else "dense"):
        own = passes(block, skipping)
    assert torch.equal(own.y, passes(block, dense).y)
    assert not torch.equal(own.grads[1], passes(block, skipping).grads[1])
