"""What every benchmark here shares: timing by turns, medians with spread, provenance, JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def by_turns(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; in a round each runs once, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the values that leave a tenth on either side."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {"median": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth]}


def speedup(dense: list[float], other: list[float]) -> dict[str, float]:
    """``dense / other``, round by round: above 1, the other is faster."""
    return spread([d / o for d, o in zip(dense, other, strict=True)])


def provenance() -> dict[str, Any]:
    """Where, when and how a number came about."""
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(name: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Write rows and provenance as JSON, if a file is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {"benchmark": name, **provenance(), "rows": rows}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {out}")


def _commit() -> str | None:
    here = Path(__file__).parent
    run = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
