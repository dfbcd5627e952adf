"""Whose products of many tokens are faster on this CPU: torch's, or those of the compiled kernels."""

from __future__ import annotations

from functools import cache

import torch

from triton_ops.processor import processor_name


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernel's products of many tokens are no slower than torch's, even if no neuron is silent.

    Measured on an AMD CPU with AVX-512: in bfloat16 about as fast as oneDNN's for hundreds of tokens and
    faster for fewer; in float32 faster than MKL's, which prefers Intel; in float16 several times faster. So
    it is in bfloat16 on one with AVX2 alone.
    """
    if not has_own(dtype):
        return True
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if dtype == torch.float32:
        return "AMD" in processor_name()
    return dtype == torch.bfloat16 and has_bfloat16_products() and not has_matrix_unit()


def torch_stalls(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's product with a neuron-major weight is out of the question: seconds for a prompt.

    So it is for the dtypes that torch has no fast products in: 5 to 40 times as long as on stock weights.
    """
    return device == "cpu" and not has_own(dtype)


@cache
def has_own(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype with instructions of this CPU; else it is very slow."""
    supported = {
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    return dtype not in supported or (torch.backends.mkldnn.is_available() and supported[dtype]())


def has_bfloat16_products() -> bool:
    """Whether this CPU has AVX512-BF16."""
    return torch.cpu._is_avx512_bf16_supported()


def has_matrix_unit() -> bool:
    """Whether this CPU has AMX, with which torch multiplies many times faster than vectors can."""
    return torch.cpu._is_amx_tile_supported()
