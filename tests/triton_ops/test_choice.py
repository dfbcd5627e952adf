"""The backend: forced by block or environment, or chosen by device, dtype, tokens, size and density."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import triton_ops
from support.backends import change_backend
from support.compiler import needs_compiler
from support.kernel_blocks import make_block
from triton_ops import DENSE, Problem, break_even, choice, reference
from triton_ops.backends import REGISTRY
from triton_ops.cpu import products
from triton_ops.problem import Form

pytestmark = pytest.mark.usefixtures("own_cache")


BIG = Problem("gated", 2048, 2048, torch.bfloat16, "cpu")
CERTIFIED = BIG._replace(certified=True)


def weight(neurons: int = 2048, hidden: int = 2048, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(neurons, hidden, dtype=dtype)


def skips(
    tokens: int, weight: torch.Tensor, form: Form, *, certified: bool = False, density: float | None = None
) -> bool:
    return triton_ops.plan(weight, form, certified=certified).backend(tokens, density) != DENSE


def multiplied(weight: torch.Tensor) -> bool:
    """Whether dense products with it are not torch's."""
    return triton_ops.plan(weight, "linear").product != DENSE


@needs_compiler
@pytest.mark.parametrize("multiplies", [False, True])
def test_auto_skips_for_one_token_of_a_large_block_and_for_many_if_products_are_fast(monkeypatch, multiplies):
    change_backend(monkeypatch, "cpp", multiplies=lambda dtype: multiplies)
    assert skips(1, weight(), "gated")
    assert skips(1, weight(dtype=torch.float32), "linear")
    assert not skips(0, weight(), "gated")
    assert skips(512, weight(), "gated") == multiplies


def test_auto_is_dense_for_small_blocks_other_dtypes_and_devices():
    assert not skips(1, weight(172, 64), "gated")
    assert not skips(1, weight(dtype=torch.float64), "gated")
    assert not skips(1, weight().to("meta"), "gated")


@needs_compiler
def test_dense_products_of_small_weights_are_torchs():
    assert skips(1, weight(192, 576), "dense_linear")  # a key projection of SmolLM2-135M
    assert not skips(1, weight(64, 576), "dense_linear")


@needs_compiler
def test_auto_is_dense_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert not skips(1, weight(dtype=torch.float32), "gated")


@needs_compiler
def test_a_known_density_widens_the_choice():
    break_even.store("cpp", BIG, (1.0, 0.2))
    assert skips(1, weight(), "gated")
    assert not skips(2, weight(), "gated")
    assert skips(2, weight(), "gated", density=0.1)


@needs_compiler
@pytest.mark.parametrize(("vectors", "matrix_unit"), [(True, False), (False, False), (True, True)])
def test_what_was_measured_with_avx512_bf16_holds_only_with_it(monkeypatch, vectors, matrix_unit):
    monkeypatch.setattr(products, "has_own", lambda dtype: True)
    monkeypatch.setattr(products, "has_bfloat16_products", lambda: vectors)
    monkeypatch.setattr(products, "has_matrix_unit", lambda: matrix_unit)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    triton_ops.forget()
    measured = vectors and not matrix_unit
    assert skips(4, weight(), "gated")
    for tokens in (5, 32, 33, 4096):
        assert skips(tokens, weight(), "gated") == measured
    assert multiplied(weight()) == measured
    assert break_even.default(REGISTRY["torch"], BIG) == (1.0,)


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "cpu", "measured"),
    [("AVX512", "AMD EPYC", True), ("AVX2", "AMD EPYC", False), ("AVX512", "Intel Xeon", False)],
)
def test_torch_keeps_float32_products_that_were_not_measured(monkeypatch, capability, cpu, measured):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "processor_name", lambda: cpu)
    triton_ops.forget()
    single = weight(dtype=torch.float32)
    assert multiplied(single) == measured
    assert skips(4, single, "gated")
    for tokens in (5, 4096):
        assert skips(tokens, single, "gated") == measured


@needs_compiler
def test_a_dense_product_is_torchs_where_that_is_asked_for_or_alone_possible(monkeypatch):
    monkeypatch.setattr(products, "has_own", lambda dtype: True)
    change_backend(monkeypatch, "cpp", multiplies=lambda dtype: True)
    assert multiplied(weight())
    assert not multiplied(weight().double())
    assert not multiplied(weight().to("meta"))
    assert not multiplied(weight(64, 64))  # too small to be worth a call
    with triton_ops.backend("cpp"):
        assert multiplied(weight(64, 64))
    for other in ("dense", "torch"):
        with triton_ops.backend(other):
            assert not multiplied(weight())
    with torch.autocast("cpu", torch.bfloat16):
        assert not multiplied(weight())


@needs_compiler
def test_a_measurement_wins_over_the_default_in_this_process_and_the_next():
    big = weight()
    break_even.store("cpp", BIG, (0.3,))
    assert not skips(1, big, "gated")
    assert skips(1, big, "gated", density=0.2)
    assert skips(1, big, "linear")  # another kind of block was not measured
    triton_ops.forget()  # as a new process would find it
    assert break_even.measured("cpp", BIG) == (0.3,)


@needs_compiler
def test_a_measurement_that_skipping_never_wins_is_obeyed():
    break_even.store("cpp", BIG, ())
    break_even.store("cpp", BIG._replace(form="plain"), (0.0, 0.3))
    assert not skips(1, weight(), "gated", density=0.0)
    assert not skips(1, weight(), "plain", density=0.0)
    assert skips(2, weight(), "plain", density=0.3)


@needs_compiler
def test_a_certificate_is_wanted_up_to_a_break_even_of_its_own():
    limit = break_even.default(REGISTRY["cpp"], CERTIFIED)[0]
    assert 0 < limit < 1
    assert skips(1, weight(), "gated", certified=True, density=limit)
    assert not skips(1, weight(), "gated", certified=True, density=1.0)
    assert skips(1, weight(), "gated", certified=True)  # asked for: the model is sparse
    assert not skips(2, weight(), "gated", certified=True, density=0.0)
    break_even.store("cpp", CERTIFIED, (1.0,))
    assert skips(1, weight(), "gated", certified=True, density=1.0)
    assert break_even.measured("cpp", BIG) is None
    assert not REGISTRY["torch"].certifies
    assert break_even.default(REGISTRY["torch"], CERTIFIED) == ()


@needs_compiler
def test_an_operator_with_a_useless_certificate_still_skips(monkeypatch):
    break_even.store("cpp", CERTIFIED, ())
    assert not skips(1, weight(), "gated", certified=True)
    seen: list[str] = []
    mlp = REGISTRY["cpp"].mlp
    change_backend(monkeypatch, "cpp", mlp=lambda x, block: seen.append("cpp") or mlp(x, block))
    block = make_block(1, 2048, 2048, torch.bfloat16, certified=True)
    block.run(triton_ops)
    assert seen == ["cpp"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 99}', '{"format_version": 1, "break_even": 3}']
)
def test_a_damaged_or_newer_cache_file_counts_as_no_measurement(own_cache, text):
    own_cache.mkdir()
    (own_cache / "break_even.json").write_text(text)
    assert break_even.measured("cpp", BIG) is None
    break_even.store("cpp", BIG, (0.5,))
    assert break_even.measured("cpp", BIG) == (0.5,)


def test_forced_backends_answer_for_every_size():
    small = weight(4, 4)
    with triton_ops.backend("torch"):
        assert skips(1000, small, "gated")
    with triton_ops.backend("dense"):
        assert not skips(1, weight(), "gated")


def test_blocks_nest_and_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("HF_SPARSE_BACKEND", "dense")
    assert choice.forced_backend() == "dense"
    with triton_ops.backend("torch"):
        assert choice.forced_backend() == "torch"
        with triton_ops.backend("auto"):
            assert choice.forced_backend() == "auto"
        assert choice.forced_backend() == "torch"
    assert choice.forced_backend() == "dense"
    monkeypatch.setenv("HF_SPARSE_BACKEND", "torch")
    assert choice.forced_backend() == "dense"  # read once
    triton_ops.forget()
    assert choice.forced_backend() == "torch"


def test_a_block_ends_with_an_exception():
    with pytest.raises(KeyError), triton_ops.backend("torch"):
        raise KeyError
    assert choice.forced_backend() == "auto"


def test_a_block_holds_in_its_own_thread_only():
    seen = []
    with triton_ops.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(choice.forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_names_list_the_choices(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' is not a backend; choose one of auto, dense, cpp"):
        triton_ops.backend("cuda").__enter__()
    monkeypatch.setenv("HF_SPARSE_BACKEND", "fast")
    with pytest.raises(ValueError, match="HF_SPARSE_BACKEND='fast' is not a backend"):
        skips(1, weight(), "gated")


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [True, False])
def test_halves_skip_for_any_number_of_tokens_where_torch_has_no_products_of_them(monkeypatch, own, dtype):
    monkeypatch.setattr(products, "has_own", lambda asked: own or asked != dtype)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    triton_ops.forget()
    half = weight(dtype=dtype)
    few = dtype == torch.bfloat16  # in which torch's own products of one token are slow everywhere
    for tokens, expected in ((1, few or not own), (7, not own), (5000, not own)):
        assert skips(tokens, half, "gated") == expected
    assert multiplied(half) == (not own)
    assert triton_ops.plan(half, "linear").stalls == (not own)
    assert not triton_ops.plan(weight(dtype=torch.float32), "linear").stalls
