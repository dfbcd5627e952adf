"""One process of two under DeepSpeed, which sharpness refuses: ``python -m support.sharp_zero``."""

from __future__ import annotations

import pytest
import torch

from hf_sparse.sharpness import SamConfig
from support.models import untrained_llama
from support.sharded_run import deepspeed_on_cpu
from support.zero3 import CONFIG


def main() -> None:
    deepspeed_on_cpu()
    import deepspeed

    deepspeed.init_distributed("gloo")
    for stage in (1, 2, 3):
        config = {**CONFIG, "zero_optimization": {"stage": stage}}
        model = untrained_llama(num_hidden_layers=1)
        engine, optimizer, *_ = deepspeed.initialize(
            model=model, config=config, model_parameters=model.parameters()
        )
        outer = torch.optim.SGD(model.parameters(), lr=0.1)
        for own, held in ((optimizer, model), (optimizer, None), (outer, engine)):
            with pytest.raises(ValueError, match="does not work with DeepSpeed ZeRO"):
                SamConfig().build(own, held)


if __name__ == "__main__":
    main()
