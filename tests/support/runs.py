"""Runs of finetune.py as users start them, and text for them to train on."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TRAINING = Path(__file__).resolve().parents[2] / "training"
LIMIT = 300
"""Seconds after which a run is taken to be stuck."""


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
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its processes then, and if it is killed it leaves them
        said = process.communicate(timeout=60)[0]
        raise AssertionError(f"not done after {LIMIT} seconds:\n{said}") from None
    finally:
        process.kill()
    assert (process.returncode == 0) == ok, said
    return said


def run_on_two(module: str, *arguments: object) -> None:
    """Run ``python -m module`` to the end as the two processes of a group (gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = str(Path(__file__).parents[1]) + os.pathsep + os.pathsep.join(sys.path)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path}
    shared["PYTHONFAULTHANDLER"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # upon which it says where it stands
        errors = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(
        error[-3000:] for error in errors
    )
