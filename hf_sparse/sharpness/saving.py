"""The state of a perturbation in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed

_NUMBERS = ("step", "samples_due")


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` from the first process; all have to call, for shards are gathered, one at a time."""
    is_first = (
        not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    )
    masks = {}
    for name, mask in state["masks"].items():
        whole = mask.full_tensor() if hasattr(mask, "placements") else mask
        if is_first:
            masks[name] = whole.cpu().contiguous()
    if is_first:
        save_file(masks, path, metadata={name: str(state[name]) for name in _NUMBERS})


def load_state(path: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote; masks are whole, on the CPU."""
    with safe_open(path, framework="pt") as file:
        numbers = file.metadata() or {}
        if missing := [name for name in _NUMBERS if name not in numbers]:
            raise ValueError(f"{path} is no saved sharpness: it does not say {', '.join(missing)}.")
        masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return {**{name: int(numbers[name]) for name in _NUMBERS}, "masks": masks}
