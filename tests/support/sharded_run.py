"""A script sharded over CPU processes: ``accelerate launch … tests/support/sharded_run.py SCRIPT …``.

Accelerate reads the settings of FSDP2 and DeepSpeed from its config file, but shards on accelerators only.
This makes CPU processes (gloo) count as such; everything after that is accelerate's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState


def fsdp_on_cpu() -> None:
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def deepspeed_on_cpu() -> None:
    """Import DeepSpeed for CPUs, without the operator that it compiles there, and on GPUs does not have.

    That one adds over processes at inference, which nothing here does. To compile it takes a minute, and a
    process that is killed meanwhile leaves a lock of PyTorch's, for which all later ones wait for ever.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        deepspeed_on_cpu()
        os.environ.pop("ACCELERATE_USE_CPU", None)  # which means no DeepSpeed
        PartialState(backend="gloo")
    else:
        fsdp_on_cpu()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
