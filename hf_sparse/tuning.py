"""tune: which layers of a model skip at how many tokens, decided by measurement on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.adapters.int8 import int8_of
from hf_sparse.adapters.walk import modules_of
from hf_sparse.calibration.input_values import of_thresholded, tell_densities
from hf_sparse.errors import PatchError
from hf_sparse.inputs import named_thresholded
from hf_sparse.metrics.sparsity import measure_beside
from hf_sparse.modules import DecodingLinear, SparseExperts, sparse_part
from hf_sparse.patching import inspect, transformers_model
from triton_ops import DENSE, Problem, break_even
from triton_ops.backends import REGISTRY
from triton_ops.int8 import INT8_TOKENS, int8_obstacle
from triton_ops.table import table
from triton_ops.tune import TOKENS, Measurement, available
from triton_ops.tune import measure as measure_shape


@dataclass(frozen=True, kw_only=True)
class TunedLayer:
    """One patched MLP block and what was found for it."""

    name: str
    """Qualified name of the block, as in ``model.get_submodule(name)``."""
    shape: str
    density: float | None
    """Mean share of neurons per token whose h is not zero; None if unknown (:func:`break_even.pays`)."""
    break_even: tuple[float, ...]
    """For 1, 2, … tokens in a call, the density up to which skipping is no slower than dense."""
    beyond: float
    """The same for more tokens; at most what is built in, which is 0 on CPUs that it does not come from."""
    certified: float | None
    """For one token, the density up to which a certificate makes it faster still; None if there is none."""
    obstacle: str | None
    """Why the block runs dense at any density, if it does."""
    int8: bool = False
    """Whether its weights are int8: on a CPU it skips at any density, and nothing is timed."""
    problems: tuple[Problem, ...] = ()
    """What was timed for it, now or before: keys of ``measurements``. None of experts, among which the tokens
    of a call are divided."""

    def skips(self, tokens: int) -> bool:
        """Whether the block skips silent neurons for this many tokens in a call."""
        if tokens < 1:
            return False
        limit = self.break_even[tokens - 1] if tokens <= len(self.break_even) else self.beyond
        return break_even.pays(limit, self.density)

    @property
    def uses_certificate(self) -> bool:
        """Whether the block decodes single tokens with its certificate."""
        return break_even.pays(self.certified or 0.0, self.density, certified=True)

    @property
    def choice(self) -> str:
        """What the block does, in words."""
        counts = [n for n in range(1, len(self.break_even) + 1) if self.skips(n)]
        if self.uses_certificate:
            counts = sorted({1, *counts})
        if not counts:
            return f"{DENSE}: {self.obstacle}" if self.obstacle else DENSE
        text = f"skips at {_ranges(counts)}"
        if self.skips(len(self.break_even) + 1):
            text += " and more"
        if self.certified is None:
            return text
        unused = f"; the certificate pays up to {self.certified:.0%}" if self.certified else ""
        return text + ("; certified at 1" if self.uses_certificate else unused)


@dataclass(frozen=True, kw_only=True)
class TunedLinears:
    """Linear layers of a prepared model that have one shape, and what was found for them."""

    count: int
    """How many there are."""
    problem: Problem
    """The key of ``measurements``: the form ``"dense_linear"``."""
    break_even: tuple[float, ...]
    """For 1, 2, … tokens in a call 1.0 if :func:`triton_ops.linear` is no slower than torch's, else 0.0."""

    @property
    def shape(self) -> str:
        """In words."""
        dtype = str(self.problem.dtype).removeprefix("torch.")
        return f"{self.problem.neurons} -> {self.problem.hidden} {dtype} dense"

    @property
    def choice(self) -> str:
        """What these layers do, in words."""
        counts = [n for n, limit in enumerate(self.break_even, 1) if limit]
        return f"reads once at {_ranges(counts)}" if counts else DENSE


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What :func:`hf_sparse.tune` found; ``print`` shows it as a table."""

    layers: tuple[TunedLayer, ...]
    """The patched MLP blocks in the order of the model, and linear layers with thresholds on their inputs."""
    tokens: tuple[int, ...]
    """Numbers of tokens in a call that the table shows."""
    linears: tuple[TunedLinears, ...] = ()
    """Of a model that :func:`hf_sparse.prepare` got ready: its other linear layers, by shape."""
    measurements: tuple[Measurement, ...]
    """Those that were made now; shapes measured before are not measured again."""

    def __str__(self) -> str:
        head = ["layer", "shape", "density", *map(str, self.tokens), "choice, by tokens in a call"]
        rows: list[list[str] | None] = [head, None]
        for layer in self.layers:
            cells = (f"{_at(layer.break_even, n):.0%}" for n in self.tokens)
            density = "?" if layer.density is None else f"{layer.density:.1%}"
            rows.append([layer.name, layer.shape, density, *cells, layer.choice])
        for one in self.linears:
            cells = (f"{_at(one.break_even, n):.0%}" for n in self.tokens)
            rows.append([f"{one.count} linear layers", one.shape, "100.0%", *cells, one.choice])
        lines = [
            table(rows, left=(0, 1, -1)),
            "in the columns: the density up to which skipping is no slower than dense, by tokens in a call",
        ]
        if any(layer.density is None for layer in self.layers):
            lines.append("unknown density counts as 100 %; give a dataset to measure it")
        else:
            lines.append("densities hold for this model object; the break-evens are kept for later processes")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    dataset: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int = 4096,
    tokens: Sequence[int] = TOKENS,
    force: bool = False,
    progress: bool = False,
) -> TuneReport:
    """Measure on this machine when the blocks of a patched model should skip; from now on they do just then.

    Every distinct shape of block is timed, dense against skipping, with random weights, over numbers of
    tokens and densities. The break-evens are kept in the cache folder, for later processes, too. With a
    ``dataset`` the density of each block is measured as well and kept on the block while it is patched: it
    skips where its own density lies below the break-even. Without one it skips only where that is no slower
    at any density. Tune on an idle machine, with as many threads as you will use, before ``torch.compile``.

    Args:
        model: a patched model of transformers, on the device and in the dtype that it will run in.
        dataset: texts, rows with a ``"text"``, or batches, as :func:`hf_sparse.measure` takes them.
        tokenizer: for texts; None loads the one of ``model.name_or_path``.
        sequence_length: tokens per window of text; None means the model's context, at most 1,024.
        batch_size: windows per forward.
        max_tokens: tokens of ``dataset`` to measure density on.
        tokens: the numbers of tokens in a call (sequences times positions) to time; 1 is always among them.
        force: measure again what was measured before.
        progress: show progress bars.

    Raises:
        PatchError: the model is not patched.
        ValueError: ``tokens`` is empty or has a number below 1, or the dataset cannot be used.
        OSError: the cache folder cannot be written.

    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens={tuple(tokens)} is not a sequence of numbers of at least 1.")
    counts = tuple(sorted({1, *tokens}))
    base = transformers_model(model)
    patched = inspect(base)
    if patched.config is None:
        raise PatchError(f"tune needs a patched model; this {type(base).__name__} is not patched.")
    blocks = [block for part in patched.patched for block in part.blocks]
    if dataset is not None:
        inputs = of_thresholded(base)
        density = measure_beside(
            inputs,
            base,
            dataset,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            progress=progress,
        )
        found = {layer.name: layer.density for layer in density.layers if layer.tokens}
        for block in blocks:
            part = sparse_part(block.module)
            assert part is not None
            part.density = found.get(block.name, part.density)
        tell_densities(inputs)

    pruned = list(named_thresholded(base))
    todo: list[tuple[str, str, Any, Tensor]] = []
    for block in blocks:
        weight = next(block.module.parameters())
        shape = f"{block.hidden_size} x {block.intermediate_size} {_name(weight)} {block.form}"
        todo.append((block.name, shape, sparse_part(block.module), weight))
    for name, linear in pruned:
        shape = f"{linear.in_features} -> {linear.out_features} {_name(linear.weight)} linear"
        todo.append((name, shape, linear, linear.weight))
    measurements: dict[Problem, Measurement] = {}
    layers = [
        _tuned(name, shape, part, weight.device.type, weight.dtype, counts, measurements, force=force)
        for name, shape, part, weight in _bar(todo, progress)
    ]
    linears = []
    for problem, count in _bar(list(Counter(_multiplied(base)).items()), progress):
        backend = available(problem.device, problem.dtype)
        limits = _limits(problem, backend, counts, measurements, force=force)
        linears.append(TunedLinears(count=count, problem=problem, break_even=limits))
    return TuneReport(
        layers=tuple(layers),
        tokens=counts,
        linears=tuple(linears),
        measurements=tuple(measurements.values()),
    )


def _name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _multiplied(model: nn.Module) -> Iterator[Problem]:
    """The problem of each linear layer that has a backend's dense product."""
    for module in modules_of(model):
        weight = module._parameters.get("weight") if isinstance(module, DecodingLinear) else None
        if weight is None or int8_of(weight) is not None or weight.ndim != 2 or not weight.numel():
            continue
        problem = Problem("dense_linear", weight.shape[0], weight.shape[1], weight.dtype, weight.device.type)
        try:
            backend = REGISTRY[available(problem.device, problem.dtype)]
        except RuntimeError:  # a device without backend
            continue
        if backend.linear is not None:
            yield problem


def _tuned(
    name: str,
    shape: str,
    part: Any,
    device: str,
    dtype: torch.dtype,
    counts: tuple[int, ...],
    measurements: dict[Problem, Measurement],
    *,
    force: bool,
) -> TunedLayer:
    """Measure what is not known of the problems of ``part``, and say what follows."""
    if part.skips_int8:
        obstacle = int8_obstacle(device, dtype)
        return TunedLayer(
            name=name,
            shape=shape,
            density=part.density,
            break_even=() if obstacle else (1.0,) * INT8_TOKENS,
            beyond=0.0,
            certified=None,
            obstacle=obstacle,
            int8=True,
        )
    problems, obstacle = part.problems()
    limits: dict[Problem, tuple[float, ...]] = {}
    for problem in problems:
        try:
            backend = available(problem.device, problem.dtype)
        except RuntimeError as error:
            obstacle = str(error)
            break
        if problem.certified and not REGISTRY[backend].certifies:
            continue
        limits[problem] = _limits(problem, backend, counts, measurements, force=force)
    skips = {problem: limit for problem, limit in limits.items() if not problem.certified}
    with_certificate = [limit for problem, limit in limits.items() if problem.certified]
    return TunedLayer(
        name=name,
        shape=shape,
        density=part.density,
        break_even=_larger(list(skips.values())),
        beyond=max((break_even.beyond(REGISTRY[backend], *item) for item in skips.items()), default=0.0),
        certified=max(with_certificate[0], default=0.0) if with_certificate else None,
        obstacle=obstacle,
        problems=() if isinstance(part, SparseExperts) else tuple(limits),
    )


def _limits(
    problem: Problem,
    backend: str,
    counts: tuple[int, ...],
    measurements: dict[Problem, Measurement],
    *,
    force: bool,
) -> tuple[float, ...]:
    """The break-evens of ``problem``, measured if need be."""
    known = break_even.measured(backend, problem)
    covered = known is not None and (problem.certified or len(known) >= counts[-1])
    if not covered or (force and problem not in measurements):
        measurements[problem] = measure_shape(problem, backend=backend, tokens=counts)
    return break_even.measured(backend, problem) or ()


def _at(limits: tuple[float, ...], tokens: int) -> float:
    return limits[tokens - 1] if tokens <= len(limits) else 0.0


def _ranges(counts: Sequence[int]) -> str:
    """Ascending numbers as ``"1-4, 8"``."""
    ranges: list[list[int]] = []
    for n in counts:
        if ranges and n == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], n]
        else:
            ranges.append([n])
    return ", ".join("-".join(map(str, r)) for r in ranges)


def _larger(limits: list[tuple[float, ...]]) -> tuple[float, ...]:
    """By tokens, the largest of several break-evens: of two ways to skip, a block takes one that pays."""
    length = max(map(len, limits), default=0)
    return tuple(max(limit[i] for limit in limits if i < len(limit)) for i in range(length))


def _bar(blocks: Sequence[Any], progress: bool) -> Iterable[Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(blocks, desc="tune", unit=" blocks", disable=not progress)
