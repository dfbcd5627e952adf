"""The ready configurations of accelerate, as its own reader takes them, and the Slurm script."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType

from support.runs import TRAINING

CONFIGS = TRAINING / "configs"
EXPECTED = {
    "one_gpu": (DistributedType.NO, 1, 1),
    "eight_gpus": (DistributedType.MULTI_GPU, 8, 1),
    "eight_gpus_fsdp": (DistributedType.FSDP, 8, 1),
    "eight_gpus_zero3": (DistributedType.DEEPSPEED, 8, 1),
    "two_machines": (DistributedType.MULTI_GPU, 16, 2),
}


def test_all_configurations_are_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_a_configuration_as_its_name_says(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == EXPECTED[name]
    assert config.mixed_precision == "no"
    assert not config.use_cpu


def test_sharded_configurations_load_in_parts_and_save_a_whole():
    fsdp = load_config_from_file(str(CONFIGS / "eight_gpus_fsdp.yaml")).fsdp_config
    assert (fsdp["fsdp_version"], fsdp["fsdp_cpu_ram_efficient_loading"]) == (2, True)
    zero = load_config_from_file(str(CONFIGS / "eight_gpus_zero3.yaml")).deepspeed_config
    assert (zero["zero_stage"], zero["zero3_init_flag"], zero["zero3_save_16bit_model"]) == (3, True, True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_is_shell():
    subprocess.run(["bash", "-n", str(CONFIGS / "slurm.sh")], check=True)
