"""The backend: forced by block or environment, or chosen by device, dtype, tokens, size and density."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import triton_ops
from support.compiler import needs_compiler
from support.kernel_blocks import make_block
from triton_ops import break_even, dispatch, reference

pytestmark = pytest.mark.usefixtures("own_cache")


def weight(neurons: int = 2048, hidden: int = 2048, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(neurons, hidden, dtype=dtype)


@needs_compiler
@pytest.mark.parametrize("multiplies", [False, True])
def test_auto_skips_for_one_token_of_a_large_block_and_for_many_if_products_are_fast(monkeypatch, multiplies):
    monkeypatch.setattr(break_even, "multiplies", lambda dtype: multiplies)
    dispatch.forget()
    assert triton_ops.wants_sparse(1, weight(), "gated")
    assert triton_ops.wants_sparse(1, weight(dtype=torch.float32), "linear")
    assert not triton_ops.wants_sparse(0, weight(), "gated")
    assert triton_ops.wants_sparse(512, weight(), "gated") == multiplies


def test_auto_is_dense_for_small_blocks_other_dtypes_and_devices():
    assert not triton_ops.wants_sparse(1, weight(172, 64), "gated")
    assert not triton_ops.wants_sparse(1, weight(dtype=torch.float64), "gated")
    assert not triton_ops.wants_sparse(1, weight().to("meta"), "gated")


@needs_compiler
def test_auto_is_dense_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert not triton_ops.wants_sparse(1, weight(dtype=torch.float32), "gated")


@needs_compiler
def test_a_known_density_widens_the_choice():
    break_even.store("cpp", "cpu", torch.bfloat16, 2048, 2048, "gated", (1.0, 0.2))
    dispatch.forget()
    assert triton_ops.wants_sparse(1, weight(), "gated")
    assert not triton_ops.wants_sparse(2, weight(), "gated")
    assert triton_ops.wants_sparse(2, weight(), "gated", density=0.1)


@needs_compiler
@pytest.mark.parametrize(("products", "matrix_unit"), [(True, False), (False, False), (True, True)])
def test_what_was_measured_with_avx512_bf16_holds_only_with_it(monkeypatch, products, matrix_unit):
    monkeypatch.setattr(break_even, "has_bfloat16_products", lambda: products)
    monkeypatch.setattr(break_even, "has_matrix_unit", lambda: matrix_unit)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    dispatch.forget()
    measured = products and not matrix_unit
    assert triton_ops.wants_sparse(4, weight(), "gated")
    for tokens in (5, 32, 33, 4096):
        assert triton_ops.wants_sparse(tokens, weight(), "gated") == measured
    assert triton_ops.wants_product(weight()) == measured
    assert break_even.default("torch", torch.bfloat16, 1 << 30) == (1.0,)


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "cpu", "measured"),
    [("AVX512", "AMD EPYC", True), ("AVX2", "AMD EPYC", False), ("AVX512", "Intel Xeon", False)],
)
def test_torch_keeps_float32_products_that_were_not_measured(monkeypatch, capability, cpu, measured):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(break_even, "_cpu", lambda: cpu)
    dispatch.forget()
    single = weight(dtype=torch.float32)
    assert triton_ops.wants_product(single) == measured
    assert triton_ops.wants_sparse(4, single, "gated")
    for tokens in (5, 4096):
        assert triton_ops.wants_sparse(tokens, single, "gated") == measured


@needs_compiler
def test_a_dense_product_is_torchs_where_that_is_asked_for_or_alone_possible(monkeypatch):
    monkeypatch.setattr(break_even, "multiplies", lambda dtype: True)
    dispatch.forget()
    assert triton_ops.wants_product(weight())
    assert not triton_ops.wants_product(weight().double())
    assert not triton_ops.wants_product(weight().to("meta"))
    assert not triton_ops.wants_product(weight(64, 64))  # too small to be worth a call
    with triton_ops.backend("cpp"):
        assert triton_ops.wants_product(weight(64, 64))
    for other in ("dense", "torch"):
        with triton_ops.backend(other):
            assert not triton_ops.wants_product(weight())
    with torch.autocast("cpu", torch.bfloat16):
        assert not triton_ops.wants_product(weight())


@needs_compiler
def test_a_measurement_wins_over_the_default_in_this_process_and_the_next():
    big, shape = weight(), (2048, 2048, "gated")
    break_even.store("cpp", "cpu", torch.bfloat16, *shape, (0.3,))
    dispatch.forget()
    assert not triton_ops.wants_sparse(1, big, "gated")
    assert triton_ops.wants_sparse(1, big, "gated", density=0.2)
    assert triton_ops.wants_sparse(1, big, "linear")  # another kind of block was not measured
    break_even.forget()  # as a new process would find it
    assert break_even.measured("cpp", "cpu", torch.bfloat16, *shape) == (0.3,)


@needs_compiler
def test_a_measurement_that_skipping_never_wins_is_obeyed():
    break_even.store("cpp", "cpu", torch.bfloat16, 2048, 2048, "gated", ())
    break_even.store("cpp", "cpu", torch.bfloat16, 2048, 2048, "plain", (0.0, 0.3))
    dispatch.forget()
    assert not triton_ops.wants_sparse(1, weight(), "gated", density=0.0)
    assert not triton_ops.wants_sparse(1, weight(), "plain", density=0.0)
    assert triton_ops.wants_sparse(2, weight(), "plain", density=0.3)


@needs_compiler
def test_a_certificate_is_wanted_up_to_a_break_even_of_its_own():
    limit = break_even.default("cpp", torch.bfloat16, 1 << 30, certified=True)[0]
    assert 0 < limit < 1
    assert triton_ops.wants_sparse(1, weight(), "gated", certified=True, density=limit)
    assert not triton_ops.wants_sparse(1, weight(), "gated", certified=True)
    assert not triton_ops.wants_sparse(2, weight(), "gated", certified=True, density=0.0)
    break_even.store("cpp", "cpu", torch.bfloat16, 2048, 2048, "gated", (1.0,), certified=True)
    dispatch.forget()
    assert triton_ops.wants_sparse(1, weight(), "gated", certified=True)
    assert break_even.measured("cpp", "cpu", torch.bfloat16, 2048, 2048, "gated") is None
    assert "torch" not in dispatch.CERTIFYING
    assert break_even.default("torch", torch.bfloat16, 1 << 30, certified=True) == ()


@needs_compiler
def test_an_operator_with_a_useless_certificate_still_skips():
    break_even.store("cpp", "cpu", torch.bfloat16, 2048, 2048, "gated", (), certified=True)
    dispatch.forget()
    assert dispatch.select(1, weight(), "gated", certified=True) is dispatch.path("cpp")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 99}', '{"format_version": 1, "break_even": 3}']
)
def test_a_damaged_or_newer_cache_file_counts_as_no_measurement(own_cache, text):
    own_cache.mkdir()
    (own_cache / "break_even.json").write_text(text)
    assert break_even.measured("cpp", "cpu", torch.bfloat16, 8, 8, "gated") is None
    break_even.store("cpp", "cpu", torch.bfloat16, 8, 8, "gated", (0.5,))
    assert break_even.measured("cpp", "cpu", torch.bfloat16, 8, 8, "gated") == (0.5,)


def test_forced_backends_answer_for_every_size():
    small = weight(4, 4)
    with triton_ops.backend("torch"):
        assert triton_ops.wants_sparse(1000, small, "gated")
    with triton_ops.backend("dense"):
        assert not triton_ops.wants_sparse(1, weight(), "gated")


def test_blocks_nest_and_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("HF_SPARSE_BACKEND", "dense")
    assert dispatch.forced_backend() == "dense"
    with triton_ops.backend("torch"):
        assert dispatch.forced_backend() == "torch"
        with triton_ops.backend("auto"):
            assert dispatch.forced_backend() == "auto"
        assert dispatch.forced_backend() == "torch"
    assert dispatch.forced_backend() == "dense"
    monkeypatch.setenv("HF_SPARSE_BACKEND", "torch")
    assert dispatch.forced_backend() == "dense"  # read once
    dispatch.forget()
    assert dispatch.forced_backend() == "torch"


def test_a_block_ends_with_an_exception():
    with pytest.raises(KeyError), triton_ops.backend("torch"):
        raise KeyError
    assert dispatch.forced_backend() == "auto"


def test_a_block_holds_in_its_own_thread_only():
    seen = []
    with triton_ops.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_names_list_the_choices(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' is not a backend; choose one of auto, dense, torch"):
        triton_ops.backend("cuda").__enter__()
    monkeypatch.setenv("HF_SPARSE_BACKEND", "fast")
    with pytest.raises(ValueError, match="HF_SPARSE_BACKEND='fast' is not a backend"):
        triton_ops.wants_sparse(1, weight(), "gated")


def test_a_forced_backend_that_cannot_run_says_why():
    block = make_block(1, 8, 12, torch.float64)
    with (
        triton_ops.backend("cpp"),
        pytest.raises(RuntimeError, match=r"'cpp' was forced.*no kernel for torch.float64"),
    ):
        block.run(triton_ops)
    with (
        triton_ops.backend("torch"),
        pytest.raises(RuntimeError, match="'torch' was forced but cannot run here"),
    ):
        block.run(triton_ops)


@pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs here"
)
def test_triton_on_cpu_tensors_names_the_interpreter():
    block = make_block(1, 8, 12, torch.float32)
    with triton_ops.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        block.run(triton_ops)


@pytest.mark.parametrize("activation", triton_ops.ACTIVATIONS)
def test_forced_dense_is_the_reference_bit_for_bit(activation):
    block = make_block(3, 40, 50, torch.bfloat16, activation, bias=True)
    with triton_ops.backend("dense"):
        assert torch.equal(block.run(triton_ops), block.run(reference))


@needs_compiler
@pytest.mark.parametrize("own", [True, False])
def test_float16_skips_for_any_number_of_tokens_unless_torch_has_float16_of_its_own(monkeypatch, own):
    monkeypatch.setattr(break_even, "has_own_float16", lambda: own)
    dispatch.forget()
    half = weight(dtype=torch.float16)
    for tokens in (1, 7, 5000):
        assert triton_ops.wants_sparse(tokens, half, "gated") == (not own)
    assert triton_ops.wants_product(half) == (not own)
    assert dispatch.torch_stalls("cpu", torch.float16) == (not own)
    assert not dispatch.torch_stalls("cpu", torch.bfloat16)
