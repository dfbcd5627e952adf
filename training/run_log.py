"""The log of a run: ``log.jsonl``, one JSON object per line; its numbers for TensorBoard and trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RunLog:
    """Writes records on the main process; does nothing on the others.

    Continuing from step n, records of later steps, which an interrupted run has left, are taken out first.

    Raises:
        ImportError: TensorBoard is wanted but not installed.

    """

    def __init__(
        self,
        folder: Path,
        *,
        main: bool,
        tensorboard: bool,
        after_step: int | None = None,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        """Continue from ``after_step``; None starts afresh. ``track`` gets the numbers, too."""
        self._file = self._board = None
        self._track = track
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        _keep_until(path, after_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError(
                    "tensorboard is not installed: `pip install tensorboard`, or set --no-tensorboard."
                ) from None
            purge = None if after_step is None else after_step + 1
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a record; its numbers, also those of mappings in it, become TensorBoard scalars."""
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        numbers = {} if kind == "run" else _numbers(kind, values)
        if self._board is not None:
            for tag, number in numbers.items():
                self._board.add_scalar(tag, number, step)
            self._board.flush()
        if self._track is not None and numbers:
            self._track(numbers, step)

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, also those of mappings in it, by ``kind/name`` or ``kind/name/key``."""
    found: dict[str, float] = {}
    for name, value in values.items():
        for sub, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float):
                found["/".join(part for part in (kind, name, sub) if part)] = number
    return found


def _keep_until(path: Path, step: int | None) -> None:
    if not path.exists():
        return
    kept = [record for record in read_log(path) if step is not None and record["step"] <= step]
    aside = path.with_name(".log.jsonl.new")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(aside, path)
