"""A backend is known by its registration alone: what is registered is offered, chosen, measured and run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import triton_ops
from support.kernel_blocks import make_block
from triton_ops import Problem, break_even, reference, tune
from triton_ops.activations import TABLE
from triton_ops.backends import REGISTRY
from triton_ops.mlp import MLP
from triton_ops.protocol import Backend, Default

ROOT = Path(triton_ops.__file__).parents[1]


@pytest.fixture
def ran(monkeypatch, own_cache) -> list[int]:
    """The tokens of the calls that a backend "mine" has run, which is registered as the best one for CPUs."""
    calls: list[int] = []

    def mlp(x: Tensor, block: MLP) -> Tensor:
        calls.append(x.numel() // x.shape[-1])
        h = TABLE[block.activation].value(x @ block.first.t(), block.threshold)
        return sparse_linear(h * (x @ block.up.t()) if block.up is not None else h, block.down, None)

    def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.sparse_linear(h, weight, bias)

    mine = Backend(
        name="mine",
        devices=("cpu",),
        dtypes=(torch.float32,),
        unusable=lambda device: None if device == "cpu" else "it is a CPU backend",
        mlp=mlp,
        sparse_linear=sparse_linear,
        defaults={torch.float32: Default(min_bytes=1, few=2)},
    )
    others = dict(REGISTRY)
    REGISTRY.clear()
    REGISTRY.update({"mine": mine, **others})
    triton_ops.forget()
    yield calls
    REGISTRY.clear()
    REGISTRY.update(others)


def test_it_is_chosen_by_its_defaults_and_measurements(ran) -> None:
    block = make_block(2, 16, 40, torch.float32)
    torch.testing.assert_close(block.run(triton_ops), block.run(reference))
    assert ran == [2]
    assert triton_ops.plan(block.gate, "gated").backend(3) == "dense"
    assert triton_ops.plan(block.gate.double(), "gated").backend(1) == "dense"
    break_even.store("mine", Problem("gated", 16, 40, torch.float32, "cpu"), (0.0, 0.0, 1.0))
    assert [triton_ops.plan(block.gate, "gated").backend(n) for n in (2, 3)] == ["dense", "mine"]


def test_it_can_be_asked_for_by_name(ran) -> None:
    block = make_block(9, 16, 40, torch.float32, gated=False)
    with triton_ops.backend("mine"):
        block.run(triton_ops)
    assert ran == [9]
    triton_ops.plain_mlp(*block.tensors(), activation="relu", backend="mine")
    assert ran == [9, 9]
    with (
        triton_ops.backend("mine"),
        pytest.raises(
            RuntimeError, match=r"'mine' was forced but cannot run here: it has no kernel for torch\.float64"
        ),
    ):
        make_block(1, 16, 40, torch.float64).run(triton_ops)


def test_it_is_what_is_measured(ran) -> None:
    assert tune.available("cpu", torch.float32) == "mine"
    result = tune.measure(Problem("gated", 16, 24, torch.float32, "cpu"), tokens=(1,), repeats=1)
    assert result.backend == "mine"
    assert 1 in ran


def test_the_argument_of_an_operator_must_be_a_backend() -> None:
    block = make_block(1, 16, 40, torch.float32)
    with pytest.raises(ValueError, match="backend='cuda' is not a backend; choose one of auto, dense, cpp"):
        triton_ops.gated_mlp(*block.tensors(), activation="relu", backend="cuda")


@pytest.mark.parametrize("path", ["triton_ops", "hf_sparse"])
def test_nothing_but_the_registrations_names_a_backend(path) -> None:
    registrations = {"cpu/backend.py", "gpu/backend.py", "stock_torch.py"}
    found = []
    for file in sorted((ROOT / path).rglob("*.py")):
        if path == "triton_ops" and file.relative_to(ROOT / path).as_posix() in registrations:
            continue
        tree = ast.parse(file.read_text())
        # The version of a package may be recorded under its name.
        keys = {id(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys}
        keys |= {
            id(name)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["_PACKAGES"]
            for name in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in REGISTRY and id(node) not in keys:
                found.append(f"{file.name}:{node.lineno}: {node.value!r}")
    assert found == []


@pytest.mark.slow
def test_what_imports_triton_is_not_imported_before_it_is_used() -> None:
    code = "import sys, triton_ops; print(*(m for m in sys.modules if m.startswith('triton_ops.gpu.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "triton_ops.gpu.backend"
