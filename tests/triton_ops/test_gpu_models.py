"""Whole models by the Triton kernels: patched, and calibrated without training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import hf_sparse
import triton_ops
from support.kernel_blocks import DEVICE
from support.models import tiny
from triton_ops.backends import REGISTRY

pytest.importorskip("triton")

IDS = torch.tensor([[5, 9, 7, 3]], device=DEVICE)
TEXT = [{"input_ids": torch.arange(3, 91, device=DEVICE).view(1, 88).repeat(4, 1)}]


def calibrated(method: str) -> Callable[[nn.Module], object]:
    return lambda model: hf_sparse.calibrate(model, TEXT, method=method, target_sparsity=0.5)


CHANGES = {
    "relu": lambda model: hf_sparse.patch(model, "relu"),
    **{method: calibrated(method) for method in ("teal", "wina", "scap", "cats")},
}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The functions of the backend that have run."""
    found: list[str] = []
    backend = REGISTRY["triton"]

    def counted(name: str) -> Callable[..., object]:
        function = getattr(backend, name)
        return lambda *args: found.append(name) or function(*args)

    for name in ("mlp", "sparse_linear"):
        monkeypatch.setitem(vars(backend), name, counted(name))
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_generate_skips_and_gives_what_dense_gives(change, calls) -> None:
    model = tiny("llama").to(DEVICE)
    CHANGES[change](model)
    hf_sparse.prepare(model)
    other = copy.deepcopy(model)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with triton_ops.backend("triton"):
        found = model.generate(IDS, **options)
    assert calls
    calls.clear()
    with triton_ops.backend("dense"):
        expected = other.generate(IDS, **options)
    assert calls == []
    assert torch.equal(found.sequences, expected.sequences)
    for one, reference in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, reference, atol=1e-4, rtol=1e-4)
