"""Measuring a model that FSDP2 has sharded over two processes (gloo)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import copy, sys, torch
from torch.distributed.fsdp import fully_shard
import hf_sparse
from support.models import tiny

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, mesh = torch.distributed.get_rank(), torch.distributed.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
ids = torch.randint(3, 128, (4, 16))
own = ids[2 * rank : 2 * rank + 2]

def train(model, measures):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reports = []
    for _ in range(3):
        if measures:
            reports.append(hf_sparse.measure(model, [{"input_ids": own}]))
        model.train()
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits, reports

model = tiny("llama")
hf_sparse.patch(model, "relu")
whole = hf_sparse.measure(model, [{"input_ids": own}])
want, _ = train(copy.deepcopy(model), False)
found, reports = train(model, True)
assert reports[0] == whole, (reports[0], whole)
assert reports[2].loss < whole.loss - 0.1
assert torch.equal(found, want)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_training_goes_on_after_a_measurement_as_if_there_was_none() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN],
            env={**shared, "RANK": str(rank), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
