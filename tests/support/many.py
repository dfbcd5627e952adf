"""Runs of finetune.py in many processes, beside those in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from run_log import read_log
from safetensors.torch import load_file

from support.runs import TRAINING, environment

SHIM = Path(__file__).with_name("sharded_run.py")
SEEN = {
    "train": {"loss", "l1", "target_threshold", "gradient_norm", "sparsity"},
    "eval": {"loss", "sparsity"},
}
FIELDS = {
    "patch": {"activation": "relu", "zeroth_bias": {"positions": 16}},
    "methods": {"l1": {"boundaries": [0.5, 1.0], "targets": [0.5, 2.0]}},
    "micro_batch": 2,
    "log_every": 1,
    "eval_tokens": 336,  # 21 sequences: processes get different numbers
}
"""Of runs whose curves are compared."""
ALL_METHODS = {**FIELDS["methods"], "mixing": {"until": 0.5}, "norm_uplift": {}, "zeroth_clip": {}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(command: Sequence[str], config: str, processes: int, *, sharded: bool = True) -> list[str]:
    """The command line ``python finetune.py …`` as one of accelerate, with a ready configuration."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    launcher += ["--config_file", str(TRAINING / "configs" / f"{config}.yaml")]
    launcher += ["--num_processes", str(processes)]
    return [*launcher, *([str(SHIM)] if sharded else []), *command[1:]]


def under_slurm(command: Sequence[str], folder: Path) -> None:
    """Run slurm.sh to its end with the options of ``command``, on two machines that are this one.

    Each has one process. ``folder`` is for the commands of Slurm, which stand in for those of a cluster.
    """
    commands = {
        "scontrol": "echo 127.0.0.1\necho 127.0.0.2",
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        'SLURM_NODEID=1 "$@" & other=$!\nSLURM_NODEID=0 "$@"\nwait $other',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\nset -e\n{body}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "a,b"}
    extra = {"PATH": path, "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", **slurm}
    done = subprocess.run(
        ["bash", str(TRAINING / "configs/slurm.sh"), *command[2:]],
        cwd=TRAINING.parent,
        env={**environment(), **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


def curves(output: Path) -> dict[str, torch.Tensor]:
    found = {}
    for kind, names in SEEN.items():
        records = [record for record in read_log(output / "log.jsonl") if record["kind"] == kind]
        assert {"loss", "sparsity"} <= records[0].keys(), kind
        for name in records[0].keys() & names:
            values = [record[name] for record in records]
            found[f"{kind} {name}"] = torch.tensor(values, dtype=torch.float64)
    return found


def same_curves(one: Path, other: Path, *, rtol: float = 2e-5) -> None:
    """Rounding of float32 sums in another order, carried through the updates."""
    found = curves(other)
    assert found.keys() == curves(one).keys()
    for name, expected in curves(one).items():
        assert len(expected) == len(found[name]) >= 3, name
        torch.testing.assert_close(
            found[name], expected, rtol=rtol, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def same_model(one: Path, other: Path) -> None:
    """The trained models have the same tensors, up to rounding."""
    expected, found = (load_file(output / "final/model.safetensors") for output in (one, other))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
