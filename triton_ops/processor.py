"""What the processor says of itself."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def processor_fields() -> dict[str, str]:
    """The fields of the first processor in ``/proc/cpuinfo``, by name; empty where there is no such file."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """The model of the processor, as its maker calls it, or the next best that the platform knows."""
    return processor_fields().get("model name") or platform.processor() or platform.machine()
