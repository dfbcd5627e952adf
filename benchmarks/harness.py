"""What all benchmarks share: interleaved timing, provenance, tables and JSON files."""

from __future__ import annotations

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

RESULTS = Path(__file__).parent / "results"


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
        low, median, high = statistics.quantiles([s * 1e3 for s in seconds], n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def interleaved(
    competitors: Mapping[str, Sequence[Callable[[], Any]]], repeats: int
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time competitors in turns, so that drift of the machine hits all alike.

    Args:
        competitors: for each name its calls, one per layer; a repeat runs them all once, so that no layer's
            weights are still in the cache when their turn comes again.
        repeats: at least 2; one more warms up and is not counted.

    Returns:
        Per name the timing of one call, and per name the median over repeats of the first competitor's time
        divided by this one's in the same repeat.

    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for repeat in range(repeats + 1):
        for name, calls in competitors.items():
            start = time.perf_counter()
            for call in calls:
                call()
            if repeat:
                seconds[name].append((time.perf_counter() - start) / len(calls))
    first = next(iter(seconds.values()))
    speedups = {
        name: statistics.median(a / b for a, b in zip(first, own, strict=True))
        for name, own in seconds.items()
    }
    return {name: Timing.of(own) for name, own in seconds.items()}, speedups


def provenance() -> dict[str, Any]:
    """Under what conditions numbers were measured; everything a reader needs to judge or repeat them."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "command": f"python benchmarks/{shlex.join(command)}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def check(actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """The gate before any number: ``actual`` is no worse against ``exact`` (float64) than twice ``expected``.

    Raises:
        SystemExit: it is worse, or not finite.

    """
    error = (actual.double() - exact).abs().max().item()
    dense_error = (expected.double() - exact).abs().max().item()
    eps = torch.finfo(actual.dtype).eps
    if not error <= 2 * dense_error + eps * exact.abs().max().item():
        raise SystemExit(f"wrong result, no timing: {what}: error {error:.3g}, dense {dense_error:.3g}")


def save(
    name: str, provenance: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], out: Path | None
) -> Path:
    """Write the rows with their provenance as JSON; returns the file."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"benchmark": name, "provenance": dict(provenance), "results": list(rows)}
    path.write_text(json.dumps(data, indent=1, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return {k: round(v, 4) for k, v in asdict(value).items()}
    return str(value)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned right, the first row as a head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
