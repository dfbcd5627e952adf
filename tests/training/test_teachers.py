"""Runs that learn from the dense model: continued, and in two processes."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import torch
from run_log import read_log
from safetensors.torch import load_file

from support.runs import run

METHODS = {
    "distillation": {"distillation": {"task": 0.5, "temperature": 2.0}},
    "blockwise": {"blockwise": {"input": "teacher"}, "l1": {"boundaries": [1.0], "targets": [0.5]}},
}


def values(output: Path, method: str) -> torch.Tensor:
    records = [record for record in read_log(output / "log.jsonl") if record["kind"] == "train"]
    return torch.tensor([[record[name] for name in ("loss", method, "gradient_norm")] for record in records])


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final/model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_a_continued_run_ends_with_the_same_bits(command, in_process, tiny, tmp_path, method):
    fields = {"methods": METHODS[method], "max_steps": 8, "log_every": 1}
    in_process(command(tmp_path / "whole", **fields))
    shutil.copytree(tmp_path / "whole", tmp_path / "continued")
    shutil.rmtree(tmp_path / "continued/checkpoints/step-00000008")
    in_process(command(tmp_path / "continued", resume=True, **fields))
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "continued")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    changed = {
        name for name, start in load_file(tiny / "model.safetensors").items() if not start.equal(whole[name])
    }
    assert changed == {name for name in whole if method != "blockwise" or ".mlp." in name}
    if method == "blockwise":
        found = values(tmp_path / "whole", method)
        assert found[-1, 1] < found[0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_as_one(command, in_process, tmp_path, method):
    fields = {"methods": METHODS[method], "max_steps": 6, "log_every": 1, "micro_batch": 2}
    in_process(command(tmp_path / "one", **fields))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run(command(tmp_path / "two", processes=2, port=port, **fields))
    one, two = values(tmp_path / "one", method), values(tmp_path / "two", method)
    assert len(one) == len(two) == 6
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
