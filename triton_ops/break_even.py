"""Up to which density skipping beats dense: conservative defaults, and what :mod:`triton_ops.tune` measured.

Density is the share of active neurons. A break-even of 1.0 says that skipping is never slower than dense.
That of a certified call says up to which density the certificate is worth its bytes: no slower than dense,
nor than skipping without it. A dense product (the form ``"dense_linear"``) has density 1: 1.0 says that the
backend's is no slower than torch's, 0.0 that it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from triton_ops.cpu.products import torch_stalls
from triton_ops.memo import forget, remembered
from triton_ops.problem import Problem
from triton_ops.processor import processor_name
from triton_ops.protocol import Backend
from triton_ops.storage import cache_dir, write_atomically

FORMAT_VERSION = 2


def pays(limit: float, density: float | None, *, certified: bool = False) -> bool:
    """Whether to skip (``certified``: with the certificate) where that is no slower up to density ``limit``.

    Here and nowhere else it is said what an unknown density means: None counts as 1, so that skipping must
    be no slower at any density. Who asks for a certificate says by doing so that the model is sparse: there
    it counts as 0, so that the certificate must pay at some density.
    """
    if density is None:
        density = 0.0 if certified else 1.0
    return 0 < limit >= density


def default(backend: Backend, problem: Problem) -> tuple[float, ...]:
    """The built-in break-even densities for 1, 2, … tokens; none where it is not worth it."""
    found = backend.default(problem.dtype)
    if found is None:
        return ()
    least = found.linear_min_bytes if problem.form == "dense_linear" else found.min_bytes
    if least is None or problem.bytes < least:
        return ()
    return found.certified if problem.certified else (1.0,) * found.few


def beyond(backend: Backend, problem: Problem, limits: tuple[float, ...]) -> float:
    """The break-even density for more tokens than ``limits`` of :func:`default` or :func:`measured` know of.

    It is built in; but where a measurement of the most tokens says less, that counts. A certificate is for
    one token, and the dense product for a few, unless torch has no fast one in this dtype.
    """
    found = backend.default(problem.dtype)
    if found is None or not limits or problem.certified or not backend.multiplies(problem.dtype):
        return 0.0
    if problem.form == "dense_linear" and not torch_stalls(problem.device, problem.dtype):
        return 0.0
    return min(found.beyond, limits[-1])


def measured(backend: str, problem: Problem) -> tuple[float, ...] | None:
    """The break-even densities for 1, 2, … tokens as measured on this machine; None if they were not."""
    found = _entries().get(_key(backend, problem))
    return None if found is None else tuple(found)


def store(backend: str, problem: Problem, density: tuple[float, ...]) -> Path:
    """Keep a measurement for this and later processes, which choose by it from now on; returns the file.

    Raises:
        OSError: the cache folder cannot be written.

    """
    path = _file()
    entries = {**_read(path), _key(backend, problem): list(density)}
    text = json.dumps({"format_version": FORMAT_VERSION, "break_even": entries}, indent=1, sort_keys=True)
    write_atomically(path, text.encode())
    forget()
    return path


def _file() -> Path:
    return cache_dir() / "break_even.json"


@remembered
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


def _key(backend: str, problem: Problem) -> str:
    form = f"{problem.form} certified" if problem.certified else problem.form
    name = str(problem.dtype).removeprefix("torch.")
    return f"{_machine(problem.device)} {backend} {name} {problem.hidden}x{problem.neurons} {form}"


def _machine(device: str) -> str:
    """What timings depend on beyond the shape; home folders are shared between machines."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {torch.get_num_threads()} threads"
