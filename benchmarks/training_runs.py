"""Runs of the training application for a comparison: made once, gone on with where they were interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those of one kind: run, original, train, eval."""
    return [record for record in records if record["kind"] == kind]


def _words(name: str, value: Any) -> list[str]:
    option = name if "." in name else name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{option}"]
    return [f"--{option}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
