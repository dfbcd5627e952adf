"""Weights & Biases and Trackio, through accelerate, where a recipe asks for them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

PROJECT = "hf_sparse"
_ID = "trackers.id"


def installed(names: Sequence[str]) -> list[str]:
    """``names``, for ``Accelerator(log_with=…)``, which would pass over what is missing.

    Raises:
        ValueError: one is not installed.

    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(
            f"trackers={list(names)}: {missing[0]} is not installed; pip install {missing[0]}, or leave it "
            "out."
        )
    return list(names)


def begin_tracking(
    accelerator: Accelerator, output: Path, about: dict[str, Any], *, continues: bool
) -> Callable[[dict[str, float], int], None] | None:
    """Start the trackers that ``accelerator`` was made with; None if there are none.

    The run has the name of ``output``, and a number that is kept there: a resumed run goes on in the same.

    Args:
        accelerator: of this process; ``end_training()`` ends the trackers.
        output: the run's folder.
        about: what is run, and on what.
        continues: whether this is a run that was begun before.

    Returns:
        what takes numbers by name, and their step.

    """
    if not accelerator.log_with:
        return None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        file = output / _ID
        if not (continues and file.exists()):
            file.write_text(uuid.uuid4().hex[:16] + "\n", encoding="utf-8")
        number = file.read_text(encoding="utf-8").strip()
        name = f"{output.resolve().name}-{number[:4]}"
        own = {
            "wandb": {"id": number, "name": name, "resume": "allow", "dir": str(output)},
            "trackio": {"name": name, "resume": "allow"},
        }
    else:
        own = {}
    accelerator.init_trackers(PROJECT, config=about, init_kwargs=own)
    return lambda values, step: accelerator.log(values, step=step)
