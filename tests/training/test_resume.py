"""Killed by SIGKILL and resumed, a run ends with the very same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_log import read_log

from support.many import free_port
from support.resumed import same_result
from support.runs import LIMIT, environment

FIELDS = {
    "max_steps": 40,
    "save_every": 8,
    "eval_every": 16,
    "log_every": 3,
    "micro_batch": 3,
    "methods": {
        "mixing": {"until": 0.25},
        "l1": {"start": 0.2, "boundaries": [0.5, 1.0], "targets": [0.5, 2.0]},
    },
    "epochs": 2,
}


@pytest.fixture(scope="module")
def with_dropout(tiny, tmp_path_factory) -> Path:
    """The tiny model with dropout, so that random states matter."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(command, with_dropout, in_process, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    in_process(command(output, model=with_dropout, **FIELDS))
    return output


def wait_for(moment: Callable[[], bool], processes: list[subprocess.Popen[bytes]], limit: int) -> None:
    """Until ``moment``, or for ``limit`` seconds; all processes have to be running then."""
    deadline = time.monotonic() + limit
    while not moment() and all(one.poll() is None for one in processes) and time.monotonic() < deadline:
        time.sleep(0.0005)
    assert all(one.poll() is None for one in processes), "the run ended before"


def kill_when(line: list[str], environment: dict[str, str], moment: Callable[[], bool]) -> None:
    """Start, wait for ``moment``, and kill without warning."""
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(moment, [process], limit=120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_step(output: Path) -> int:
    log = output / "log.jsonl"
    return max((record["step"] for record in read_log(log)), default=0) if log.exists() else 0


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_and_after_the_third(
    command, with_dropout, uninterrupted, in_process, tmp_path
):
    output = tmp_path / "run"
    line = command(output, model=with_dropout, resume=True, **FIELDS)
    for at in (5, 29):
        kill_when(line, environment(), lambda at=at: last_step(output) >= at)
        assert not (output / "final").exists()
    in_process(line)
    same_result(output, uninterrupted)


@pytest.mark.slow
def test_killed_while_saving(command, with_dropout, uninterrupted, in_process, tmp_path, capsys):
    for attempt in range(5):  # a save is short; try until the kill falls into one
        output = tmp_path / f"run{attempt}"
        line = command(output, model=with_dropout, resume=True, **FIELDS)
        half = output / "checkpoints/.incomplete-step-00000016/optimizer.bin"
        kill_when(line, environment(), half.exists)
        if half.exists():
            break
    assert half.exists()
    assert not (output / "checkpoints/step-00000016").exists()
    assert (output / "checkpoints/step-00000008").exists()
    in_process(line)
    printed = capsys.readouterr().out
    assert "continuing from" in printed
    assert "step-00000008" in printed
    assert not list((output / "checkpoints").glob(".incomplete*"))
    same_result(output, uninterrupted)


def two(line: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start ``line`` as the two processes of a group; a launcher would not be killed with those it starts."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            line,
            env={**environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in (0, 1)
    ]


def ended(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(timeout=LIMIT) for process in processes]


@pytest.mark.slow
def test_two_processes_killed_while_saving_and_stopped_end_with_the_same_bits(
    command, with_dropout, tmp_path
):
    fields = {**FIELDS, "model": with_dropout, "resume": True}
    whole = tmp_path / "whole"
    assert ended(two(command(whole, **fields))) == [0, 0]
    for attempt in range(5):
        output = tmp_path / f"run{attempt}"
        line = command(output, **fields)
        half = output / "checkpoints/.incomplete-step-00000016/optimizer.bin"
        processes = two(line)
        wait_for(half.exists, processes, LIMIT)
        for process in processes:
            process.kill()
        assert ended(processes) == [-signal.SIGKILL] * 2
        if half.exists():
            break
    assert half.exists()
    processes = two(line)
    wait_for(lambda: last_step(output) >= 20, processes, LIMIT)
    processes[1].send_signal(signal.SIGTERM)  # one is told, and all save
    assert ended(processes) == [143, 143]
    newest = max(path.name for path in (output / "checkpoints").iterdir())
    assert "step-00000020" <= newest < "step-00000040"
    assert ended(two(line)) == [0, 0]
    same_result(output, whole)


def test_a_finished_run_resumed_stays_as_it_is(command, with_dropout, uninterrupted, in_process, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(uninterrupted, output)
    in_process(command(output, model=with_dropout, resume=True, **FIELDS))
    same_result(output, uninterrupted)
