"""Up to which density skipping beats dense: conservative defaults, and what :mod:`triton_ops.tune` measured.

Density is the share of active neurons. A break-even of 1.0 says that skipping is never slower than dense.
That of a certified call says up to which density the certificate is worth its bytes: no slower than dense,
nor than skipping without it.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from triton_ops.storage import cache_dir, write_atomically

FORMAT_VERSION = 2

Kind = Literal["gated", "plain", "linear"]
MATRICES: dict[Kind, int] = {"gated": 3, "plain": 2, "linear": 1}
"""How many weight matrices each kind of operator has."""


@dataclass(frozen=True, kw_only=True)
class Default:
    """What holds without a measurement on this machine."""

    min_bytes: int
    """Size of the weights of a block below which the call of the operator costs more than skipping saves."""

    few: int
    """Number of tokens up to which skipping is no slower at any density, for all three operators."""

    beyond: float = 0.0
    """Break-even density for more tokens than those, on a CPU that :func:`multiplies`."""

    certified: tuple[float, ...] = ()
    """Density up to which a certificate makes an MLP faster still, for 1 token; none: no use for one."""


# From one two-core machine with AVX512-BF16, at the shapes of Llama-3.2-1B and Llama-2-7B;
# `python -m triton_ops.tune` measures yours. With up to four tokens any machine spends its time reading
# weights. A certificate is one byte per weight and leaves more rows to read than are active; it pays while
# those are well below half of a 2-byte gate.
DEFAULTS: dict[tuple[str, torch.dtype], Default] = {
    ("cpp", torch.bfloat16): Default(min_bytes=1 << 20, few=4, beyond=1.0, certified=(0.12,)),
    ("cpp", torch.float16): Default(min_bytes=4 << 20, few=4, beyond=1.0, certified=(0.12,)),
    ("cpp", torch.float32): Default(min_bytes=4 << 20, few=4, beyond=1.0, certified=(0.3,)),
    ("torch", torch.bfloat16): Default(min_bytes=16 << 20, few=1),
    ("torch", torch.float32): Default(min_bytes=16 << 20, few=1),
}


def default(
    backend: str, dtype: torch.dtype, weight_bytes: int, certified: bool = False
) -> tuple[float, ...]:
    """The built-in break-even densities for 1, 2, … tokens; none where it is not worth it."""
    found = _default(backend, dtype)
    if found is None or weight_bytes < found.min_bytes:
        return ()
    return found.certified if certified else (1.0,) * found.few


def beyond(backend: str, dtype: torch.dtype, limits: tuple[float, ...]) -> float:
    """The break-even density for more tokens than ``limits`` of :func:`default` or :func:`measured` know of.

    It is built in; but where a measurement of the most tokens says less, that counts.
    """
    found = _default(backend, dtype)
    return min(found.beyond, limits[-1]) if found and limits else 0.0


def _default(backend: str, dtype: torch.dtype) -> Default | None:
    found = DEFAULTS.get((backend, dtype))
    if found is None or multiplies(dtype):
        return found
    if dtype == torch.float16:
        return None  # not measured on such a machine
    return replace(found, beyond=0.0)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernel's products of many tokens are no slower than torch's, even if no neuron is silent.

    Measured on an AMD CPU with AVX-512: in bfloat16 about as fast as oneDNN's for hundreds of tokens and
    faster for fewer; in float32 faster than MKL's, which prefers Intel; in float16 several times faster.
    """
    if dtype == torch.float16:
        return not has_own_float16()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if dtype == torch.float32:
        return "AMD" in _cpu()
    return dtype == torch.bfloat16 and has_bfloat16_products() and not has_matrix_unit()


@cache
def has_own_float16() -> bool:
    """Whether torch multiplies float16 matrices with instructions of this CPU; else it is very slow."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def has_bfloat16_products() -> bool:
    """Whether this CPU has AVX512-BF16."""
    return torch.cpu._is_avx512_bf16_supported()


def has_matrix_unit() -> bool:
    """Whether this CPU has AMX, with which torch multiplies many times faster than vectors can."""
    return torch.cpu._is_amx_tile_supported()


def measured(
    backend: str,
    device: str,
    dtype: torch.dtype,
    hidden: int,
    neurons: int,
    kind: Kind,
    certified: bool = False,
) -> tuple[float, ...] | None:
    """The break-even densities for 1, 2, … tokens as measured on this machine; None if they were not."""
    found = _entries().get(_key(backend, device, dtype, hidden, neurons, kind, certified))
    return None if found is None else tuple(found)


def store(
    backend: str,
    device: str,
    dtype: torch.dtype,
    hidden: int,
    neurons: int,
    kind: Kind,
    density: tuple[float, ...],
    certified: bool = False,
) -> Path:
    """Keep a measurement for this and later processes; returns the file.

    Raises:
        OSError: the cache folder cannot be written.

    """
    path = _file()
    entries = {**_read(path), _key(backend, device, dtype, hidden, neurons, kind, certified): list(density)}
    text = json.dumps({"format_version": FORMAT_VERSION, "break_even": entries}, indent=1, sort_keys=True)
    write_atomically(path, text.encode())
    forget()
    return path


def forget() -> None:
    """Read the file anew at the next question."""
    _entries.cache_clear()


def _file() -> Path:
    return cache_dir() / "break_even.json"


@cache
def _entries() -> dict[str, list[float]]:
    return _read(_file())


def _read(path: Path) -> dict[str, list[float]]:
    """The stored measurements; an unreadable or foreign file counts as none, for it can be measured again."""
    try:
        data: Any = json.loads(path.read_text())
        if data["format_version"] != FORMAT_VERSION:
            return {}
        return {str(k): [float(d) for d in v] for k, v in data["break_even"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _key(
    backend: str, device: str, dtype: torch.dtype, hidden: int, neurons: int, kind: Kind, certified: bool
) -> str:
    block = f"{kind} certified" if certified else kind
    name = str(dtype).removeprefix("torch.")
    return f"{_machine(device)} {backend} {name} {hidden}x{neurons} {block}"


def _machine(device: str) -> str:
    """What timings depend on beyond the shape; home folders are shared between machines."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu()}, {torch.get_num_threads()} threads"


@cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
