"""Compiled graphs follow the choice of a backend as it is when they run, not as it was when traced."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import hf_sparse
import triton_ops
from support.backends import change_backend
from triton_ops import Problem, break_even
from triton_ops.backends import REGISTRY, automatic
from triton_ops.mlp import MLP
from triton_ops.tune import available

pytestmark = pytest.mark.usefixtures("own_cache")
PROBLEM = Problem("gated", 32, 88, torch.float32, "cpu")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The backends that have run MLPs, in order. Dense calls run none."""
    names: list[str] = []

    def watched(name: str):
        mlp = REGISTRY[name].mlp

        def run(x: Tensor, block: MLP) -> Tensor:
            names.append(name)
            return mlp(x, block)

        return run

    for name in [backend.name for backend in automatic("cpu")]:
        change_backend(monkeypatch, name, mlp=watched(name), native=lambda: False)  # which would not be heard
    return names


@pytest.fixture
def block(tiny_model):
    """A block, and the same compiled."""
    return patched(tiny_model)


def patched(tiny_model):
    (found, *_) = hf_sparse.patch(tiny_model("llama"), "relu").blocks
    found.module.prepare(certify=False)
    return found.module, torch.compile(found.module, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def no_gradient():
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    assert not counters["graph_break"]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


X = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("first", "second"), [("dense", "torch"), ("torch", "dense"), ("auto", "torch")])
def test_a_block_of_another_backend_holds_for_what_was_compiled_before(block, ran, first, second) -> None:
    module, compiled = block
    expected = module.dense(X)
    for _ in range(2):
        for name in (first, second):
            ran.clear()
            with hf_sparse.backend(name):
                torch.testing.assert_close(compiled(X), expected)
            assert ran == (["torch"] if name == "torch" else [])
    assert graphs() == 2  # one for each; going back makes no other


def test_also_for_a_model_that_is_compiled_later(tiny_model, ran) -> None:
    with hf_sparse.backend("dense"):
        patched(tiny_model)[1](X)
    module, compiled = patched(tiny_model)
    assert ran == []
    with hf_sparse.backend("torch"):
        torch.testing.assert_close(compiled(X), module.dense(X))
    assert ran == ["torch"]
    ran.clear()
    compiled(X)  # too small for the automatic choice
    assert ran == []


def test_what_is_measured_after_compiling_counts(block, ran) -> None:
    module, compiled = block
    best = available("cpu", torch.float32)
    expected = compiled(X)
    assert ran == []
    break_even.store(best, PROBLEM, (1.0,))
    torch.testing.assert_close(compiled(X), expected)
    assert ran == [best]
    ran.clear()
    break_even.store(best, PROBLEM, (0.5,))
    compiled(X)
    assert ran == []  # the density is not known
    module.density = 0.4
    torch.testing.assert_close(compiled(X), expected)
    assert ran == [best]


def test_the_environment_is_read_again_after_forget(block, ran, monkeypatch) -> None:
    _, compiled = block
    compiled(X)
    monkeypatch.setenv("HF_SPARSE_BACKEND", "torch")
    compiled(X)
    assert ran == []
    triton_ops.forget()
    compiled(X)
    assert ran == ["torch"]


def test_a_block_holds_in_its_own_thread_only(block, ran) -> None:
    _, compiled = block
    compiled(X)

    def elsewhere() -> None:
        with torch.no_grad():
            compiled(X)

    def in_thread() -> list[str]:
        ran.clear()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return ran

    with hf_sparse.backend("torch"):
        assert in_thread() == []
        compiled(X)
        assert ran == ["torch"]
        assert in_thread() == []
    assert graphs() == 2


def test_steps_of_decoding_and_prompts_of_any_length_share_their_graphs(block, ran) -> None:
    _, compiled = block
    best = available("cpu", torch.float32)
    break_even.store(best, PROBLEM, (1.0,) * 4 + (0.0,) * 28)
    for tokens in (1, 1, 2, 3, 4, 1, 40, 5, 33, 7, 200):
        ran.clear()
        compiled(torch.randn(1, tokens, 32))
        assert ran == ([best] if tokens <= 4 else [])
    assert graphs() <= 4  # one token, few, many; torch may try a fixed size first
