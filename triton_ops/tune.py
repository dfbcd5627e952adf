"""Measures, on this machine, up to which density skipping beats dense, and keeps it for later choices.

``python -m triton_ops.tune --hidden 2048 --neurons 8192 --dtype bfloat16`` prints a table and stores the
result; :func:`measure` does the same from Python, and ``hf_sparse.tune`` for all layers of a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from triton_ops import break_even, reference
from triton_ops.backends import DENSE, REGISTRY, automatic
from triton_ops.certificate import Certificate
from triton_ops.certifier import certify
from triton_ops.dense_linear import linear
from triton_ops.layout import neuron_major_
from triton_ops.ops import gated_mlp, plain_mlp, sparse_linear
from triton_ops.problem import MATRICES, Form, Problem
from triton_ops.table import table

TOKENS = (1, 2, 4, 8, 16, 32)
DENSITIES = (1.0, 0.75, 0.5, 0.3, 0.2, 0.1, 0.05)
NO_SLOWER = 0.97
"""Skipping that takes up to ``1 / 0.97`` of the time of dense counts as no slower: clocks tell no better."""
HOPELESS = 3.0  # times the dense time: not measured again after the first counted round
_NAMES: dict[Form, str] = {
    "gated": "gated MLP",
    "plain": "plain MLP",
    "linear": "linear",
    "dense_linear": "dense linear",
}
COLD_BYTES = 128 << 20  # of weights that calls cycle through, more than a cache holds …
COLD_DECIDING_BYTES = 64 << 20  # … and of those that every call reads, however sparse


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of one problem on this machine, in milliseconds per call."""

    problem: Problem
    backend: str
    dense_ms: dict[int, float]
    """By tokens."""
    sparse_ms: dict[int, dict[float, float]]
    """By tokens, then by density of independent tokens; with the certificate if it is ``certified``."""
    uncertified_ms: dict[int, dict[float, float]] = field(default_factory=dict)
    """If it is ``certified``: skipping without the certificate, which it must not be slower than either."""

    @property
    def break_even(self) -> tuple[float, ...]:
        """For 1, 2, … tokens, the largest density at which, and below which, skipping was no slower.

        0 where it never was. A count between two measured ones has the smaller of their break-evens.
        """
        counts = sorted(self.dense_ms)
        measured = {tokens: self._break_even(tokens) for tokens in counts}
        found = []
        for tokens in range(1, counts[-1] + 1):
            below = max((n for n in counts if n <= tokens), default=None)
            above = min(n for n in counts if n >= tokens)
            found.append(0.0 if below is None else min(measured[below], measured[above]))
        return tuple(found)

    def _break_even(self, tokens: int) -> float:
        best = 0.0
        for density in sorted(self.sparse_ms[tokens]):
            if self.ratio(tokens, density) < NO_SLOWER:
                break
            best = density
        return best

    def ratio(self, tokens: int, density: float) -> float:
        """How many times faster than its rival: dense or, if ``certified``, the faster of the other two."""
        rival = self.dense_ms[tokens]
        if self.problem.certified:
            rival = min(rival, self.uncertified_ms[tokens][density])
        return rival / self.sparse_ms[tokens][density]

    def __str__(self) -> str:
        form, hidden, neurons, dtype, _, certified = self.problem
        densities = sorted(self.sparse_ms[min(self.dense_ms)])
        what = _NAMES[form]
        rival = "the faster of dense and uncertified / certified" if certified else "dense / sparse"
        if form == "dense_linear":
            rival = "dense by torch / by the backend"
        name = str(dtype).removeprefix("torch.")
        head = f"{self.backend}, {name}, {hidden} x {neurons}, {what}; {rival} time by density"
        rows = [["tokens", "dense ms", *(f"{d:.0%}" for d in reversed(densities)), "break-even"]]
        for tokens, dense in self.dense_ms.items():
            ratios = (f"{self.ratio(tokens, d):.2f}" for d in reversed(densities))
            limit = self._break_even(tokens)
            rows.append([str(tokens), f"{dense:.3f}", *ratios, f"{limit:.0%}" if limit else "never"])
        return f"{head}\n{table(rows, left=())}"


def measure(
    problem: Problem,
    *,
    backend: str | None = None,
    tokens: Sequence[int] = TOKENS,
    densities: Sequence[float] = DENSITIES,
    repeats: int = 7,
    save: bool = True,
) -> Measurement:
    """Time dense and skipping at a block's shape with random weights, cycling past the cache.

    Args:
        problem: what to measure, on ``"cpu"`` or ``"cuda"``. ``certified``: what a certificate adds, for one
            token; ``tokens`` is not read. ``"dense_linear"``: the backend's dense product against torch's;
            ``densities`` is not read.
        backend: the name of one that skips; None takes the best that can run.
        tokens: the numbers of tokens to measure, of at least 1; 1 is always among them.
        densities: the shares of active neurons to measure; break-evens are told at these.
        repeats: times that each point is measured; the median counts.
        save: keep the result in the cache folder; this and later processes choose by it.

    Raises:
        ValueError: ``tokens`` is empty or has a number below 1; a certificate for ``"linear"`` or
            ``"dense_linear"``.
        RuntimeError: no backend can run with this dtype on this device, or has a use for a certificate, or a
            dense product of its own.
        OSError: ``save`` and the cache folder cannot be written.

    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens={tuple(tokens)} is not a sequence of numbers of at least 1.")
    certified = problem.certified
    counts = (1,) if certified else tuple(sorted({1, *tokens}))
    if certified and MATRICES[problem.form] == 1:
        raise ValueError(f"certified=True has no meaning for form={problem.form!r}, which has no gate.")
    name = backend or available(problem.device, problem.dtype)
    if certified and not REGISTRY[name].certifies:
        known = " and ".join(found.name for found in REGISTRY.values() if found.certifies)
        raise RuntimeError(f"backend {name!r} has no use for a certificate; {known} have.")
    if problem.form == "dense_linear":
        densities = (1.0,)
        if REGISTRY[name].linear is None:
            known = " and ".join(found.name for found in REGISTRY.values() if found.linear)
            raise RuntimeError(f"backend {name!r} has no dense product of its own; {known} has.")
    blocks = _blocks(problem)
    dense_ms: dict[int, float] = {}
    sparse_ms: dict[int, dict[float, float]] = {}
    uncertified_ms: dict[int, dict[float, float]] = {}
    with torch.inference_mode():
        for count in counts:
            calls: dict[Any, list[Callable[[], Tensor]]] = {DENSE: []}
            for block in blocks:
                calls[DENSE].append(block.dense(count))
                for density in densities:
                    for pass_it in (False, True) if certified else (False,):
                        call = block.sparse(count, density, name, pass_it)
                        calls.setdefault((density, pass_it), []).append(call)
            times = _interleaved(calls, repeats, problem.device)
            dense_ms[count] = times[DENSE]
            sparse_ms[count] = {density: times[density, certified] for density in densities}
            if certified:
                uncertified_ms[count] = {density: times[density, False] for density in densities}
    result = Measurement(
        problem=problem,
        backend=name,
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
        uncertified_ms=uncertified_ms,
    )
    if save:
        break_even.store(name, problem, result.break_even)
    return result


def available(device: str, dtype: torch.dtype) -> str:
    """The backend that automatic choice would take for tensors of ``dtype`` on ``device``.

    Raises:
        RuntimeError: none can run; the message says why.

    """
    reasons = []
    for backend in automatic(device):
        reason = backend.obstacle(device, dtype)
        if reason is None:
            return backend.name
        reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"nothing to measure for {dtype} on {device}: {'; '.join(reasons) or 'no backend'}.")


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Weights of one MLP, and calls of it."""

    up: tuple[Tensor, ...]
    """Gate and up ``[F, D]``, or up alone, or none in a linear."""
    down: Tensor
    """``[D, F]`` as a linear stores it."""
    rows: Tensor
    """The same, neuron-major."""
    certificate: Certificate | None
    skips: bool = True
    """Whether a linear is the sparse one."""

    def copy(self) -> _Block:
        """The same values elsewhere in memory."""
        certificate = self.certificate and Certificate(*(t.clone() for t in self.certificate))
        up, down = tuple(t.clone() for t in self.up), self.down.clone()
        rows = self.rows.clone() if self.skips else down
        return _Block(up=up, down=down, rows=rows, certificate=certificate, skips=self.skips)

    def dense(self, tokens: int) -> Callable[[], Tensor]:
        """The dense call, which takes as long at every density."""
        x = self._input(tokens)
        if not self.up:
            return lambda: reference.sparse_linear(x, self.down)
        run: Any = reference.gated_mlp if len(self.up) == 2 else reference.plain_mlp
        return lambda: run(x, *self.up, self.down, activation="shifted_relu", threshold=0.5)

    def sparse(self, tokens: int, density: float, backend: str, certified: bool) -> Callable[[], Tensor]:
        """The skipping call with this share of active neurons, drawn for each token on its own."""
        x = self._input(tokens)
        if not self.skips:
            return lambda: linear(x, self.down, backend=backend)
        if not self.up:
            h = x.masked_fill(torch.rand_like(x, dtype=torch.float32) >= density, 0)
            return lambda: sparse_linear(h, self.rows, backend=backend)
        p = (x @ self.up[0].t()).float().flatten().sort().values
        shift = p[min(int((1 - density) * p.numel()), p.numel() - 1)].item() if density < 1 else -1e4
        run: Any = gated_mlp if len(self.up) == 2 else plain_mlp
        options: dict[str, Any] = {"activation": "shifted_relu", "threshold": shift, "backend": backend}
        if certified:
            options["certificate"] = self.certificate
        return lambda: run(x, *self.up, self.rows, **options)

    def _input(self, tokens: int) -> Tensor:
        width = self.up[0].shape[1] if self.up else self.down.shape[1]
        return torch.randn(tokens, width, device=self.down.device).to(self.down.dtype)


def _blocks(problem: Problem) -> list[_Block]:
    """As many blocks with random weights as it takes to leave the cache between two uses of one."""
    form, hidden, neurons, dtype, device, certified = problem

    def rand(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)

    up = tuple(rand(neurons, hidden) for _ in range(MATRICES[form] - 1))
    down = rand(hidden, neurons)
    certificate = certify(up[0]) if certified else None
    skips = form != "dense_linear"
    rows = neuron_major_(down.clone()) if skips else down
    first = _Block(up=up, down=down, rows=rows, certificate=certificate, skips=skips)
    deciding = hidden * neurons if certified else problem.down_bytes
    count = max(-(-COLD_BYTES // problem.bytes), -(-COLD_DECIDING_BYTES // deciding))
    return [first, *(first.copy() for _ in range(min(count, 64) - 1))]


def _interleaved(calls: dict[Any, list[Callable[[], Tensor]]], repeats: int, device: str) -> dict[Any, float]:
    """Median milliseconds per call, the competitors taking turns so that drift hits all alike."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 1):
        for key, functions in calls.items():
            if repeat > 1 and times[key][0] > HOPELESS * times[DENSE][0]:
                continue
            start = _now(device)
            for function in functions:
                function()
            if repeat:  # the first round warms up
                times[key].append((_now(device) - start) / len(functions) * 1e3)
    return {key: sorted(values)[len(values) // 2] for key, values in times.items()}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m triton_ops.tune", description=__doc__)
    parser.add_argument("--hidden", type=int, required=True, help="size D of the residual stream")
    parser.add_argument("--neurons", type=int, required=True, help="intermediate size F")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--form", default="gated", choices=list(MATRICES), help="operator; default: gated")
    parser.add_argument("--certified", action="store_true", help="what a certificate adds, for one token")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", choices=list(REGISTRY), help="default: the best that can run")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens to measure")
    parser.add_argument("--dry-run", action="store_true", help="print, but do not store the break-even")
    args = parser.parse_args()
    problem = Problem(
        args.form, args.hidden, args.neurons, getattr(torch, args.dtype), args.device, args.certified
    )
    result = measure(problem, backend=args.backend, tokens=args.tokens, save=not args.dry_run)
    print(result)


if __name__ == "__main__":
    main()
