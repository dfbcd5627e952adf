"""Which backend runs: forced by the user, or planned from device, dtype, size and measured break-evens.

A :class:`Plan` is made once for each :class:`Problem`, and again after :func:`triton_ops.forget`. Whoever
calls an operator asks the plan, with the tokens and the density of the call, and hands the answer on as the
operator's ``backend``; an operator that is given none asks for itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_ops import break_even, memo
from triton_ops.backends import AUTO, BACKENDS, DENSE, REGISTRY, automatic
from triton_ops.cpu.products import torch_stalls
from triton_ops.memo import remembered
from triton_ops.problem import Form, Problem
from triton_ops.protocol import Backend

ENVIRONMENT = "HF_SPARSE_BACKEND"

_forced: ContextVar[str] = ContextVar("hf_sparse_backend", default="")


class _OfThread(threading.local):
    """The same for compiled graphs, which guard on it: Dynamo reads no context variables."""

    def __init__(self) -> None:
        self.forced = ""


_of_thread = _OfThread()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend of every operator called inside the ``with`` block (in this thread or async task).

    It wins over the environment variable ``HF_SPARSE_BACKEND``; ``"auto"`` gives the choice back to the
    package. Compiled graphs follow: torch compiles one for each backend that they run under. To them the
    innermost block of the thread counts, also where async tasks take turns inside of blocks of their own.

    Raises:
        ValueError: ``name`` is not one of :data:`triton_ops.BACKENDS`.

    """
    token = _forced.set(_checked(name, "backend"))
    _of_thread.forced = name
    try:
        yield
    finally:
        _forced.reset(token)
        _of_thread.forced = _forced.get()


def _checked(name: str, source: str) -> str:
    if name not in (AUTO, DENSE) and name not in REGISTRY:
        raise ValueError(f"{source}={name!r} is not a backend; choose one of {', '.join(BACKENDS)}.")
    return name


def forced_backend() -> str:
    """The backend of the innermost :func:`backend` block, else of the environment, else ``"auto"``."""
    return _forced.get() or _from_environment()


@remembered
def _from_environment() -> str:
    return _checked(os.environ.get(ENVIRONMENT) or AUTO, ENVIRONMENT)


_AUTOCASTING = frozenset(device for backend in REGISTRY.values() for device in backend.devices)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; torch raises where there is none, as for ``"meta"``."""
    return device in _AUTOCASTING and torch.is_autocast_enabled(device)


class Plan(NamedTuple):
    """How calls of one problem run. Plain values, of which a compiler makes constants."""

    skipping: str
    """The backend that skips silent neurons; ``"dense"`` if none does."""
    forced: bool
    """Whether the user has chosen it, for every call."""
    steps: tuple[tuple[int, float], ...]
    """``(tokens, density)`` in ascending order: for so many tokens and fewer, down to the step before, the
    density up to which skipping pays."""
    beyond: float
    """The density for more tokens."""
    certified: bool
    """Whether all this is about calls with a certificate."""
    product: str
    """The backend whose ``sparse_linear`` should do dense products with the down projection once that is
    neuron-major; ``"dense"`` if torch should."""
    stalls: bool
    """Whether torch takes so long for such a product that the stock layout must come back first."""

    def backend(self, tokens: int, density: float | None = None) -> str:
        """The backend of a call that skips; ``"dense"`` where skipping does not pay.

        Args:
            tokens: in the call, over all leading dimensions.
            density: the share of neurons that are active for a token on average; None if that is not known,
                which :func:`triton_ops.break_even.pays` gives its meaning.

        """
        if self.forced:
            return self.skipping
        if tokens and break_even.pays(self._limit(tokens), density, certified=self.certified):
            return self.skipping
        return DENSE

    def _limit(self, tokens: int) -> float:
        # A compiler with symbolic sizes guards on the ranges and not on each number of tokens.
        for most, limit in self.steps:
            if tokens <= most:
                return limit
        return self.beyond


_UNDER_AUTOCAST = Plan(DENSE, True, (), 0.0, False, DENSE, False)


def plan(weight: Tensor, form: Form, *, certified: bool = False) -> Plan:
    """The plan for an operator with this weight: the forced backend, or the best one that pays.

    Args:
        weight: the gate, or the up projection of a plain MLP, ``[F, D]``; with ``"linear"`` and
            ``"dense_linear"`` their own weight, ``[D, F]``. Its device, dtype and shape count, not its
            values. Under ``torch.compile`` its shape must be static, as a module's parameter has it.
        form: the operator.
        certified: for calls that pass a certificate.

    Returns:
        The plan. Under autocast all is dense, which the operators leave to torch.

    """
    device = weight.device.type
    if autocasts(device):
        return _UNDER_AUTOCAST
    first, second = weight.shape
    hidden, neurons = (first, second) if form in ("linear", "dense_linear") else (second, first)
    problem = Problem(form, hidden, neurons, weight.dtype, device, certified)
    if torch.compiler.is_compiling():
        # What the compiler sees being read it guards on.
        return Plan(*_in_graph(_of_thread.forced, memo.epoch, *problem))
    return plan_of(problem, forced_backend())


# Dynamo can trace neither files nor compilers; what it needs of them is constant in an epoch.
@torch.compiler.assume_constant_result
def _in_graph(forced: str, epoch: str, *problem: Any) -> tuple[Any, ...]:
    return tuple(plan_of(Problem(*problem), forced or _from_environment()))


@remembered
def plan_of(problem: Problem, forced: str) -> Plan:
    """The plan for calls outside of autocast, where the backend ``forced`` is (or ``"auto"``)."""
    name, limits, beyond = (forced, (), 0.0) if forced != AUTO else _best(problem)
    if problem.form == "dense_linear" and name in REGISTRY and REGISTRY[name].linear is None:
        name = DENSE  # what it would call is torch's
    # Of limits that are equal one after the other, the last number of tokens.
    runs = [list(run) for _, run in groupby(enumerate(limits, 1), key=lambda item: item[1])]
    return Plan(
        skipping=name,
        forced=forced != AUTO,
        steps=tuple(run[-1] for run in runs),
        beyond=beyond,
        certified=problem.certified,
        product=_product(forced, problem),
        stalls=torch_stalls(problem.device, problem.dtype),
    )


def _best(problem: Problem) -> tuple[str, tuple[float, ...], float]:
    """The best available backend, and the densities up to which it pays: for 1, 2, … tokens, and for more."""
    for found in automatic(problem.device):
        if problem.form == "dense_linear" and found.linear is None:
            continue
        limits = break_even.measured(found.name, problem)
        measured = limits is not None
        if limits is None:
            limits = break_even.default(found, problem)
        # In this order: asking a backend whether it is usable may build it, which small models never need. A
        # measurement counts also when it says "never": no other backend has been measured to do better.
        if (limits or measured) and _usable(found, problem):
            return found.name, limits, break_even.beyond(found, problem, limits)
    return DENSE, (), 0.0


def _product(forced: str, problem: Problem) -> str:
    for found in automatic(problem.device):
        default = found.defaults.get(problem.dtype)
        if default is None or forced not in (AUTO, found.name):
            continue
        # A small one is not worth the call, unless torch would stall.
        small = problem.down_bytes < default.min_bytes and not torch_stalls(problem.device, problem.dtype)
        if found.multiplies(problem.dtype) and not (small and forced == AUTO) and _usable(found, problem):
            return found.name
    return DENSE


def _usable(found: Backend, problem: Problem) -> bool:
    return found.obstacle(problem.device, problem.dtype) is None


@remembered
def backend_with(function: str, dtype: torch.dtype, forced: str, device: str = "cpu") -> Backend | None:
    """The one with this optional function that runs in this dtype on the device, where it is ``forced``."""
    for found in automatic(device) if forced == AUTO else [REGISTRY[forced]] if forced in REGISTRY else []:
        if getattr(found, function) is not None and found.obstacle(device, dtype) is None:
            return found
    return None


def cpu_backend_in_graph(function: str, dtype: torch.dtype) -> str | None:
    """The name of :func:`backend_with`, for a graph that is being compiled, which guards on it."""
    return _cpu_backend(_of_thread.forced, memo.epoch, function, dtype)


@torch.compiler.assume_constant_result
def _cpu_backend(forced: str, epoch: str, function: str, dtype: torch.dtype) -> str | None:
    found = backend_with(function, dtype, forced or _from_environment())
    return None if found is None else found.name


def is_native_in_graph(name: str | None) -> bool:
    """Whether a graph that is being compiled for the CPU calls the overload ``native`` for this backend."""
    return _is_native(memo.epoch, name)


@torch.compiler.assume_constant_result
def _is_native(epoch: str, name: str | None) -> bool:
    return name in REGISTRY and REGISTRY[name].native()


@remembered
def runnable(name: str, device: str, dtype: torch.dtype) -> Backend:
    """The backend of this name, which runs in this dtype on this type of device.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run here; the message says why.

    """
    if name not in REGISTRY:
        raise ValueError(f"backend={name!r} is not a backend; choose one of {', '.join(BACKENDS)}.")
    reason = REGISTRY[name].obstacle(device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was forced but cannot run here: {reason}.")
    return REGISTRY[name]
