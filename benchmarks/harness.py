"""What all benchmarks share: competitors timed in turns, the gate before any number, conditions, JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from triton_ops.cpu.products import has_matrix_unit
from triton_ops.processor import processor_name
from triton_ops.table import table as columns

RESULTS = Path(__file__).parent / "results"
NAME = Path(sys.argv[0]).stem  # of the benchmark that runs


def parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``doc`` is its docstring."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    found.add_argument("--repeats", type=int, default=repeats, help="at least 2; default: %(default)s")
    found.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    found.add_argument(
        "--out", type=Path, help="default: in benchmarks/results, by the names of script and device"
    )
    return found


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Set threads, seed and output file, print and return the conditions of the run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out = args.out or RESULTS / f"{NAME}{'_cuda' if args.device == 'cuda' else ''}.json"
    conditions = provenance(args.device)
    print(", ".join(f"{k} {v}" for k, v in conditions.items() if v is not None), flush=True)
    return conditions


def begin_reading(args: argparse.Namespace) -> dict[str, Any]:
    """:func:`begin`, and time a streaming read of memory, ``args.read``, to compare with."""
    conditions = begin(args)
    args.read = StreamingRead(args.device)
    conditions["streaming_read"] = args.read.before
    print(f"memory is read at {args.read.before['gb_per_s']} GB/s by {args.read.call}", flush=True)
    return conditions


class Run:
    """One competitor: its calls, one per layer, all made once per repeat.

    Enough layers make sure that none of their weights are still in a cache when their turn comes again. On
    ``cuda`` the calls are captured in one CUDA graph, unless ``graph`` is False: then the host's time counts.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: str, *, graph: bool = True) -> None:
        self._calls, self._device = calls, device
        self._graph = self._capture() if device == "cuda" and graph else None

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and allocate outside of the capture
            for _ in range(2):
                self._outputs = [call() for call in self._calls]
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = [call() for call in self._calls]
        return graph

    def outputs(self) -> list[Any]:
        """Of every call, computed by just what is timed."""
        if self._graph is None:
            return [call() for call in self._calls]
        self._graph.replay()
        torch.cuda.synchronize()
        return self._outputs

    def seconds(self) -> float:
        """Of one call, averaged over the layers."""
        if self._graph is None:
            self._wait()
            start = time.perf_counter()
            for call in self._calls:
                call()
            self._wait()
            return (time.perf_counter() - start) / len(self._calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the first replay runs, the second is queued: the launch from the host is not in the time.
        self._graph.replay()
        begin.record()
        self._graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(self._calls)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over the repeats of one competitor."""

    median_ms: float
    low_ms: float
    """First quartile."""
    high_ms: float
    """Third quartile."""
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, median, high = _quartiles([s * 1e3 for s in seconds])
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the first competitor, over the turns: both times are of the same turn."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Sequence[float], own: Sequence[float]) -> Ratio:
        low, median, high = _quartiles([a / b for a, b in zip(first, own, strict=True)])
        return cls(median, low, high)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def interleaved(runs: Mapping[str, Run], repeats: int) -> tuple[dict[str, Timing], dict[str, Ratio]]:
    """Time competitors in turns, so that drift of the machine hits all alike; one turn more warms up.

    Returns:
        Per name the timing of one call, and per name the ratio to the first competitor.

    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            taken = run.seconds()
            if repeat:
                seconds[name].append(taken)
    first = next(iter(seconds.values()))
    return (
        {name: Timing.of(own) for name, own in seconds.items()},
        {name: Ratio.of(first, own) for name, own in seconds.items()},
    )


def check(actual: Tensor, expected: Tensor, exact: Tensor, what: str) -> None:
    """The gate before any number: ``actual`` is no worse against ``exact`` (float64) than twice ``expected``.

    Allowed besides are one rounding of the largest output to its dtype and a few in float32, for the dense
    error of a small block can happen to be next to nothing.

    Raises:
        SystemExit: it is worse, or not finite.

    """
    error = (actual.double() - exact).abs().max().item()
    dense_error = (expected.double() - exact).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps + 4 * torch.finfo(torch.float32).eps
    if not error <= 2 * dense_error + rounding * exact.abs().max().item():
        raise SystemExit(f"wrong result, no timing: {what}: error {error:.3g}, dense {dense_error:.3g}")


def check_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """The gate where results must be the same bits.

    Raises:
        SystemExit: they are not.

    """
    if not torch.equal(actual, expected):
        error = (actual.double() - expected.double()).abs().max().item()
        raise SystemExit(f"wrong result, no timing: {what}: not identical, off by {error:.3g}")


class StreamingRead:
    """How fast this machine reads memory: the fastest of a few calls of torch that read a large buffer once.

    Its ``run`` takes turns with the competitors, for what memory gives varies with what else is running.
    """

    def __init__(self, device: str) -> None:
        self._mib = 2048 if device == "cuda" else 512
        buffer = torch.ones(self._mib << 18, device=device)
        calls: dict[str, Callable[[], Tensor]] = {
            "torch.sum of bfloat16": buffer.view(torch.bfloat16).sum,
            "torch.amax of float32": buffer.amax,
        }
        if device == "cpu":
            # Products with a matrix read at half the speed of these in torch 2.13 on two AVX-512 cores.
            calls["torch.dot of float32"] = lambda: torch.dot(buffer, buffer)
        with torch.inference_mode():
            runs = {name: Run([call], device) for name, call in calls.items()}
            times, _ = interleaved(runs, repeats=9)
        self.call = min(times, key=lambda name: times[name].median_ms)
        self.run = runs[self.call]
        self.before = {"call": self.call, "buffer_mib": self._mib, "gb_per_s": self.speed(times[self.call])}

    def speed(self, timing: Timing) -> float:
        """In GB/s."""
        return round((self._mib << 20) / timing.median_ms / 1e6, 1)


def _without_folder(argument: str) -> str:
    """Where a user keeps files is nobody's business, and repeats no run; also of ``NAME=/folder/file``."""
    name, equals, place = argument.rpartition("=")
    return f"{name}{equals}{Path(place).name}" if os.path.isabs(place) else argument


def provenance(device: str) -> dict[str, Any]:
    """Under what conditions numbers were measured; everything a reader needs to judge or repeat them."""
    command = [_without_folder(a) for a in sys.argv]
    return {
        "command": f"python benchmarks/{shlex.join([Path(command[0]).name, *command[1:]])}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cpu": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability() + (", AMX" if has_matrix_unit() else ""),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def smollm2() -> LlamaConfig:
    """The shape of SmolLM2-135M."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(path: Path, conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows with their conditions as JSON; what is there already is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "benchmark": NAME,
        "provenance": dict(conditions),
        "results": list(rows),
    }
    path.write_text(json.dumps(data, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Timing | Ratio):
        return {k: round(v, 5) for k, v in asdict(value).items()}
    return str(value)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns aligned right under the keys of the rows."""
    return columns([list(rows[0]), None, *(list(row.values()) for row in rows)], left=())
