"""Runs of the training application for a comparison: made once, gone on with where they were interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from triton_ops.processor import processor_name

ROOT = Path(__file__).resolve().parents[1]
_FLAGS = ("--resume", "--no-tensorboard", "--no-progress")


def train(output: Path, recipe: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log of the shipped ``recipe`` with ``fields`` changed, in ``output``; trained if it is not there.

    Raises:
        CalledProcessError: the run failed.

    """
    if not (output / "final").exists():
        given = {**fields, "output_dir": output}
        options = [word for name, value in given.items() for word in _words(name, value)]
        path = str(ROOT / "training" / "recipes" / f"{recipe}.yaml")
        finetune = str(ROOT / "training" / "finetune.py")
        subprocess.run([sys.executable, finetune, "--config", path, *options, *_FLAGS], check=True)
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Results:
    """Rows of finished runs in a JSON file, which grows: a run that has its row there is not made again.

    All runs of a file have the same ``fields``; a file with others is not added to. Several processes may add
    to one file, each its own runs.

    Raises:
        SystemExit: it has others.

    """

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self.fields = path, json.loads(json.dumps(fields))
        self.rows: list[dict[str, Any]] = []
        self._read()

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a row with these values."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, key: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Add a row, with when and where it was made, and write the file."""
        made = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "cpu": processor_name(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._read()
            self.rows.append({**key, **made, **found})
            whole = {"fields": self.fields, "runs": self.rows}
            self.path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _read(self) -> None:
        if not self.path.exists():
            return
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        if kept["fields"] != self.fields:
            raise SystemExit(f"{self.path} has runs with other fields: {kept['fields']}; move it away.")
        self.rows = kept["runs"]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # let go when closed
            yield
        finally:
            os.close(folder)


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those of one kind: run, original, train, eval."""
    return [record for record in records if record["kind"] == kind]


def _words(name: str, value: Any) -> list[str]:
    option = name if "." in name else name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{option}"]
    return [f"--{option}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
