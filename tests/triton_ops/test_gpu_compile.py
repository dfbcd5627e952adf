"""The kernels compile for an H200, also without one: the interpreter checks neither types nor layouts."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import pytest
import torch

from triton_ops.activations import TABLE

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8"}
# As torch.empty gives it, a pointer is divisible by 16; so are integers that happen to be.
DIVISIBLE = [["tt.divisibility", 16]]
HIDDEN, NEURONS = 4096, 14336


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any]) -> Any:
    """``kernel`` for compute capability 9.0; a dtype among the ``arguments`` stands for a pointer."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else arguments[name]
        if name in constants or value is None or value == 1:
            signature[name], values[i,] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[name], attributes[i,] = f"*{TYPES[value]}", DIVISIBLE
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0 and isinstance(value, int):
                attributes[i,] = DIVISIBLE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        source = ASTSource(kernel, signature, values, attributes)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def hidden_one(
    dtype: torch.dtype,
    *,
    certified: bool,
    gated: bool,
    kind: int = 0,
    hidden: int = HIDDEN,
    each: bool = False,
) -> Any:
    from triton_ops.gpu import launch, one_token

    tensors = dict.fromkeys(("x_ptr", "gate_ptr", "gate_bias_ptr", "h_ptr"), dtype)
    tensors |= dict.fromkeys(("up_ptr", "up_bias_ptr"), dtype if gated else None)
    tensors["thresholds_ptr"] = dtype if each else None
    tensors |= (
        {"q_ptr": torch.int8, "bounds_ptr": torch.float32}
        if certified
        else {"q_ptr": None, "bounds_ptr": None}
    )
    sizes = {"D": hidden, "F": NEURONS, "gate_stride": hidden, "up_stride": hidden if gated else 0}
    floats = dict.fromkeys(("threshold", "gate_error", "own_error", "underflow"), 1e-4)
    constants = {
        "KIND": kind,
        "GATED": gated,
        "GATE_BIAS": True,
        "UP_BIAS": gated,
        "EACH": each,
        "CERTIFIED": certified,
    }
    tile = launch.hidden_one(hidden, dtype, certified=certified)
    return compiled(one_token._hidden_kernel, tensors | sizes | floats, constants | tile._asdict())


def hidden_several(dtype: torch.dtype, tokens: int, *, gated: bool, kind: int = 0, each: bool = False) -> Any:
    from triton_ops.gpu import launch, several_tokens

    tensors = dict.fromkeys(("x_ptr", "gate_ptr", "gate_bias_ptr", "h_ptr"), dtype)
    tensors |= dict.fromkeys(("up_ptr", "up_bias_ptr"), dtype if gated else None)
    tensors["thresholds_ptr"] = dtype if each else None
    sizes = {
        "T": tokens,
        "D": HIDDEN,
        "F": NEURONS,
        "gate_stride": HIDDEN,
        "up_stride": HIDDEN if gated else 0,
    }
    constants = {
        "KIND": kind,
        "GATED": gated,
        "GATE_BIAS": True,
        "UP_BIAS": gated,
        "EACH": each,
        "UPCAST": False,
    }
    tile = launch.hidden_several(tokens, HIDDEN, dtype)
    return compiled(
        several_tokens._hidden_kernel, tensors | sizes | {"threshold": 0.5}, constants | tile._asdict()
    )


def partial(dtype: torch.dtype, tokens: int) -> Any:
    from triton_ops.gpu import down, launch

    tile, _, spans = launch.down(tokens, HIDDEN, NEURONS)
    tensors = {"h_ptr": dtype, "down_ptr": dtype, "partial_ptr": torch.float32}
    sizes = {"T": tokens, "D": HIDDEN, "F": NEURONS, "stride": HIDDEN, "spans": spans}
    return compiled(down._partial_kernel, tensors | sizes, {"UPCAST": False} | tile._asdict())


@pytest.mark.parametrize("certified", [False, True], ids=["exact", "certified"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_reads_weights_sixteen_bytes_at_a_time(dtype, certified):
    ptx = hidden_one(dtype, certified=certified, gated=True).asm["ptx"]
    weights = [line for line in ptx.splitlines() if "ld.global" in line and "evict_first" in line]
    assert weights
    assert all(".v4.b32" in line for line in weights)


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_every_activation_compiles(row):
    options = {"gated": row.relu_up, "kind": row.code, "each": row.parameter is not None}
    hidden_one(torch.float16, certified=True, **options)
    hidden_several(torch.float16, 2, **options)


@pytest.mark.parametrize("tokens", [8, 32])
def test_several_tokens_use_tensor_cores_and_loads_under_way(tokens):
    for kernel in (hidden_several(torch.bfloat16, tokens, gated=True), partial(torch.bfloat16, tokens)):
        ptx = kernel.asm["ptx"]
        assert "mma.sync" in ptx or "wgmma" in ptx
        assert "cp.async" in ptx


@pytest.mark.parametrize("tokens", [1, 8])
def test_down_compiles_in_float32(tokens):
    assert "fma.rn.f32" in partial(torch.float32, tokens).asm["ptx"]


def test_the_sum_compiles():
    from triton_ops.gpu import down

    tensors = {"partial_ptr": torch.float32, "bias_ptr": torch.bfloat16, "y_ptr": torch.bfloat16}
    constants = {"BIAS": True, "BLOCK_S": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}
    sizes = {"T": 8, "D": HIDDEN, "splits": 16}
    assert "atom" not in compiled(down._sum_kernel, tensors | sizes, constants).asm["ptx"]


@pytest.mark.parametrize("hidden", [4096, 4095])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_row_is_summed_in_the_same_order_with_a_certificate(dtype, hidden):
    # Lanes, warps and their order are what the layout of the summed tile says; equal bits need equal layouts.
    from triton_ops.gpu import launch

    width = launch.hidden_one(hidden, dtype, certified=True).BLOCK_D

    def layouts(certified: bool) -> set[str]:
        ir = hidden_one(dtype, certified=certified, gated=True, hidden=hidden).asm["ttgir"]
        found = re.findall(rf"tensor<{launch.ROWS}x{width}xf32, (#\w+)>\) -> tensor", ir)
        return {re.search(rf"^{name} = (.*)$", ir, re.MULTILINE)[1] for name in found}

    assert len(layouts(False)) == 1
    assert layouts(False) == layouts(True)
