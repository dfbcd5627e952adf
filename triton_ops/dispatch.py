"""Which backend runs: forced by the user, or chosen from device, dtype, tokens, size and measured break-even.

``"dense"``   the plain formula of :mod:`triton_ops.reference`
``"torch"``   skipping with stock PyTorch operators (CPU)
``"cpp"``     the compiled one-pass kernel (CPU)
``"triton"``  Triton kernels (GPU; on CPU tensors under ``TRITON_INTERPRET=1``)
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from triton_ops import break_even, stock_torch
from triton_ops.break_even import MATRICES, Kind
from triton_ops.cpu import backend as cpu_backend

BACKENDS = ("auto", "dense", "torch", "cpp", "triton")
# By device, the best first. On GPUs a cuBLAS product is hard to beat without a CUDA graph, so there Triton is
# chosen only where a measurement says so.
AUTOMATIC = {"cpu": ("cpp", "torch"), "cuda": ("triton",)}
CERTIFYING = ("cpp", "triton")
"""The backends that make use of a certificate."""
ENVIRONMENT = "HF_SPARSE_BACKEND"

_forced: ContextVar[str | None] = ContextVar("hf_sparse_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend of every operator called inside the ``with`` block (in this thread or async task).

    It wins over the environment variable ``HF_SPARSE_BACKEND``; ``"auto"`` gives the choice back to the
    package. Under ``torch.compile`` the choice between a module's dense form and the operator is made when
    the graph is traced; the choice among the operator's backends is made at every call.

    Raises:
        ValueError: ``name`` is not one of ``"auto"``, ``"dense"``, ``"torch"``, ``"cpp"``, ``"triton"``.

    """
    token = _forced.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend; choose one of {', '.join(BACKENDS)}.")
    return name


# Dynamo cannot trace context variables, files or compilers; what it needs of them is constant in a trace.
@torch.compiler.assume_constant_result
def forced_backend() -> str:
    """The backend of the innermost :func:`backend` block, else of the environment, else ``"auto"``."""
    return _forced.get() or _from_environment()


@cache
def _from_environment() -> str:
    return _checked(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; torch raises where there is none, as for ``"meta"``."""
    return device in AUTOMATIC and torch.is_autocast_enabled(device)


def path(name: str) -> ModuleType:
    """The module of a backend other than ``"dense"``: ``unusable``, ``mlp``, ``sparse_linear``.

    Raises:
        RuntimeError: Triton is not installed.

    """
    if name == "triton":
        # Only here: importing Triton takes long, and it is not made for every platform.
        try:
            return importlib.import_module("triton_ops.gpu.backend")
        except ImportError as error:
            raise RuntimeError(f"backend 'triton' cannot run here: {error}; pip install triton.") from error
    return {"torch": stock_torch, "cpp": cpu_backend}[name]


def wants_sparse(
    tokens: int, weight: Tensor, kind: Kind, *, certified: bool = False, density: float = 1.0
) -> bool:
    """Whether an MLP should take the skipping operator now, or its stock dense forward.

    Args:
        tokens: in this call, over all leading dimensions.
        weight: the gate, or the up projection of a plain MLP, ``[F, D]``; with ``"linear"`` its own weight,
            ``[D, F]``. Its device, dtype and shape count, not its values. Under ``torch.compile`` its shape
            must be static, as a module's parameter has it.
        kind: the operator: ``"gated"`` (:func:`gated_mlp`), ``"plain"`` (:func:`plain_mlp`) or ``"linear"``
            (:func:`sparse_linear`).
        certified: ask whether to pass a certificate.
        density: the share of neurons that are active for a token on average, if that is known.

    Returns:
        False if ``"dense"`` is forced, True if another backend is forced; else whether some backend has been
        measured to be no slower than dense here (``certified``: nor than skipping without the certificate).
        False under autocast, which the operators leave to torch.

    """
    device = weight.device.type
    if autocasts(device):
        return False
    return choose(tokens, device, weight.dtype, *_sizes(weight, kind), kind, certified, density) != "dense"


def _sizes(weight: Tensor, kind: Kind) -> tuple[int, int]:
    """Hidden size and neurons."""
    first, second = weight.shape
    return (first, second) if kind == "linear" else (second, first)


def choose(
    tokens: int,
    device: str,
    dtype: torch.dtype,
    hidden: int,
    neurons: int,
    kind: Kind,
    certified: bool = False,
    density: float = 1.0,
) -> str:
    """The backend for these sizes: a forced one unseen, or the best that is available and worth it."""
    name = forced_backend()
    if name != "auto":
        return name
    name, limits, beyond = best(device, dtype, hidden, neurons, kind, certified)
    if not (tokens and limits):
        return "dense"
    # limits[i] belongs to i + 1 tokens; 0 means that skipping never wins there.
    limit = limits[tokens - 1] if tokens <= len(limits) else beyond
    return name if 0 < limit >= density else "dense"


@torch.compiler.assume_constant_result
def best(
    device: str, dtype: torch.dtype, hidden: int, neurons: int, kind: Kind, certified: bool = False
) -> tuple[str, tuple[float, ...], float]:
    """The best available backend for these sizes, and the density up to which it wins.

    That for 1, 2, … tokens, and that for more.
    """
    return _best(device, dtype, hidden, neurons, kind, certified)


def wants_product(weight: Tensor) -> bool:
    """Whether a dense product with the neuron-major ``weight [D, F]`` is better left to ``sparse_linear``.

    For any number of tokens: torch, whose matrix libraries bring such a weight into another order at every
    call, is slower on some machines. False if another backend than the compiled one is forced, and under
    autocast.
    """
    device, size = weight.device.type, weight.numel() * weight.dtype.itemsize
    return device == "cpu" and not autocasts(device) and _multiplies(forced_backend(), weight.dtype, size)


@torch.compiler.assume_constant_result
def _multiplies(forced: str, dtype: torch.dtype, size: int) -> bool:
    return _own_product(forced, dtype, size)


@cache
def _own_product(forced: str, dtype: torch.dtype, size: int) -> bool:
    default = break_even.DEFAULTS.get(("cpp", dtype))
    return (
        forced in ("auto", "cpp")
        and default is not None
        and (forced == "cpp" or dtype == torch.float16 or size >= default.min_bytes)
        and break_even.multiplies(dtype)
        and _usable("cpp", "cpu", dtype)
    )


@torch.compiler.assume_constant_result
def torch_stalls(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's product with a neuron-major weight is out of the question: seconds for a prompt.

    So it is for float16 on CPUs without float16 arithmetic.
    """
    return device == "cpu" and dtype == torch.float16 and not break_even.has_own_float16()


def forget() -> None:
    """Choose anew from now on, after a measurement or a change of the environment."""
    _from_environment.cache_clear()
    _best.cache_clear()
    _own_product.cache_clear()
    _runnable.cache_clear()


@cache
def _best(
    device: str, dtype: torch.dtype, hidden: int, neurons: int, kind: Kind, certified: bool = False
) -> tuple[str, tuple[float, ...], float]:
    weight_bytes = MATRICES[kind] * hidden * neurons * dtype.itemsize
    for name in AUTOMATIC.get(device, ()):
        limits = break_even.measured(name, device, dtype, hidden, neurons, kind, certified)
        measured = limits is not None
        if limits is None:
            limits = break_even.default(name, dtype, weight_bytes, certified)
        # In this order: asking a path whether it is usable may build it, which small models never need. A
        # measurement counts also when it says "never": no other backend has been measured to do better.
        if (limits or measured) and _usable(name, device, dtype):
            return name, limits, 0.0 if certified else break_even.beyond(name, dtype, limits)
    return "dense", (), 0.0


def _usable(name: str, device: str, dtype: torch.dtype) -> bool:
    try:
        _runnable(name, device, dtype)
    except RuntimeError:  # also where Triton was measured, and is not installed now
        return False
    return True


def select(tokens: int, weight: Tensor, kind: Kind, certified: bool = False) -> ModuleType | None:
    """The path that the operator takes, None for dense; arguments as in :func:`wants_sparse`.

    Raises:
        RuntimeError: a forced backend cannot run here; the message says why.

    """
    device, dtype = weight.device.type, weight.dtype
    sizes = tokens, device, dtype, *_sizes(weight, kind), kind
    name = choose(*sizes, certified, density=0.0)
    if name == "dense" and certified:  # a certificate may be given where it is of no use
        name = choose(*sizes, density=0.0)
    if name == "dense" and kind == "linear" and wants_product(weight):
        name = "cpp"
    return None if name == "dense" else _runnable(name, device, dtype)


@cache
def _runnable(name: str, device: str, dtype: torch.dtype) -> ModuleType:
    found = path(name)
    reason = found.unusable(torch.device(device), dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was forced but cannot run here: {reason}.")
    return found
