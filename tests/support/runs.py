"""Runs of finetune.py as users start them, and text for them to train on."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

TRAINING = Path(__file__).resolve().parents[2] / "training"


def sentences(count: int, seed: int) -> list[str]:
    """Documents of different lengths, no two alike."""
    rng = random.Random(seed)
    words = ["the", "cat", "dog", "tree", "river", "runs", "sleeps", "sees", "under", "green", "because"]
    return [f"{seed}-{i} {' '.join(rng.choices(words, k=rng.randint(3, 60)))}" for i in range(count)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": t, "url": f"u{i}"}) + "\n" for i, t in enumerate(texts))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def environment() -> dict[str, str]:
    """One thread and no network, on the CPU."""
    extra = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **extra, "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str], *, ok: bool = True) -> str:
    """Run to the end; gives what it printed."""
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout
