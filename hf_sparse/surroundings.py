"""On what a run or a measurement takes place: versions and machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hf_sparse._version import __version__
from triton_ops.processor import processor_name

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "triton")


def versions() -> dict[str, str]:
    """Of Python and of what takes part."""
    found = {"python": platform.python_version(), "hf_sparse": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, how much of it this process may use, and the GPU if there is one."""
    found: dict[str, Any] = {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found
