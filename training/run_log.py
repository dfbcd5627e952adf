"""The log of a run: ``log.jsonl``, one JSON object per line, and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class RunLog:
    """Writes records on the main process; does nothing on the others.

    Continuing from step n, records of later steps, which an interrupted run has left, are taken out first.

    Raises:
        ImportError: TensorBoard is wanted but not installed.

    """

    def __init__(self, folder: Path, *, main: bool, tensorboard: bool, after_step: int | None = None) -> None:
        """``after_step``: the step that the run continues from; None starts afresh."""
        self._file = self._board = None
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
        if self._board is not None and kind != "run":
            for name, value in values.items():
                scalars = value.items() if isinstance(value, dict) else [("", value)]
                for sub, number in scalars:
                    if isinstance(number, int | float):
                        tag = "/".join(part for part in (kind, name, sub) if part)
                        self._board.add_scalar(tag, number, step)
            self._board.flush()

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


def _keep_until(path: Path, step: int | None) -> None:
    if not path.exists():
        return
    kept = [record for record in read_log(path) if step is not None and record["step"] <= step]
    aside = path.with_name(".log.jsonl.new")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(aside, path)
