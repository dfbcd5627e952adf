"""Worker processes prepare the same batches, say what is wrong, and never outlive what started them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from data import DataExhaustedError, TrainingData, evaluation_data, open_documents
from recipe import Recipe
from run_log import read_log

from support.runs import environment, sentences, write_jsonl

pytestmark = pytest.mark.slow


def training_data(dataset: Path, tokenizer, states=None, **fields) -> TrainingData:
    some = {"sequence_length": 16, "global_batch": 16, "eval_tokens": 320, "shuffle_buffer": 7}
    recipe = Recipe(dataset=str(dataset), **{**some, **fields})
    source = open_documents(recipe)
    _, held_out = evaluation_data(recipe, source, tokenizer)
    return TrainingData(recipe, source, tokenizer, held_out, states=states)


def batches(data: TrainingData, count: int) -> list:
    iterator = iter(data)
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def test_any_number_of_workers_gives_the_same_batches_and_states(texts, tokenizer):
    mix_in = {"mix_in": {"dataset": str(texts), "share": 0.25}}
    alone = batches(training_data(texts, tokenizer, **mix_in), 6)
    random_state = torch.get_rng_state()
    for workers in (1, 2):
        found = batches(training_data(texts, tokenizer, data_workers=workers, **mix_in), 6)
        rest = batches(
            training_data(texts, tokenizer, states=found[2].states, data_workers=workers, **mix_in), 3
        )
        for expected, one in zip([*alone, *alone[3:]], [*found, *rest], strict=True):
            assert torch.equal(one.input_ids, expected.input_ids)
            assert one.states == expected.states
        assert not active_children()
    assert torch.equal(torch.get_rng_state(), random_state)  # that of dropout


@pytest.mark.filterwarnings("ignore:a document is left out")
def test_errors_of_workers_are_as_without_them(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "train.jsonl", sentences(200, 0))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:40], "{\n" * 9, *lines[40:]]))
    write_jsonl(tmp_path / "valid.jsonl", sentences(40, 1))
    for error, fields in (
        (DataExhaustedError, {}),
        (ValueError, {"max_bad_documents": 8}),  # of all streams together: each has two at most
    ):
        said = []
        for workers in (0, 2):
            with pytest.raises(error) as caught:
                batches(training_data(tmp_path, tokenizer, data_workers=workers, **fields), 1000)
            said.append(str(caught.value))
        if error is ValueError:
            assert said[0] == said[1]
        assert not active_children()


def test_a_worker_that_is_killed_ends_the_run_with_a_line_about_it(texts, tokenizer):
    iterator = iter(training_data(texts, tokenizer, data_workers=2, epochs=10**6))
    next(iterator)
    victim = min(child.pid for child in active_children())
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"exited unexpectedly.*lower data_workers=2"):
        deque(iterator, maxlen=0)
    assert not active_children()


def test_a_run_that_is_killed_leaves_no_worker(command, tmp_path):
    fields = {"max_steps": 4000, "save_every": 4, "eval_every": 0, "log_every": 1, "epochs": 10**6}
    line = command(tmp_path / "run", data_workers=2, **fields)
    process = subprocess.Popen(
        line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    checkpoint = tmp_path / "run/checkpoints/step-00000008"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert checkpoint.exists()
    os.kill(process.pid, signal.SIGKILL)  # it alone, and not its workers
    process.wait()
    deadline = time.monotonic() + 60
    while (left := of_group(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def test_a_run_is_the_same_with_workers(command, in_process, tmp_path):
    for workers in (0, 2):
        in_process(command(tmp_path / str(workers), data_workers=workers, log_every=1))
    logs = [read_log(tmp_path / f"{workers}/log.jsonl")[1:] for workers in (0, 2)]
    for record in (*logs[0], *logs[1]):
        for name in ("tokens_per_second", "data_wait"):
            record.pop(name, None)
    assert logs[0] == logs[1]


def of_group(group: int) -> list[str]:
    out = subprocess.run(
        ["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    return [args for pgid, state, args in rows if int(pgid) == group and not state.startswith("Z")]
