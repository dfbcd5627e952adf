"""One process of two that train under DeepSpeed's ZeRO-3: ``python -m support.zero3 FOLDER``.

FOLDER has a folder for each kind of block, with a patched checkpoint and a stock one. Rank 0 writes the
logits there, by kind, before and after two updates: of the stock model with ReLU, of the loaded one, and of
one that was patched after loading.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import hf_sparse
from hf_sparse.adapters import find_blocks
from support.sharded_run import deepspeed_on_cpu
from support.twins import IDS, KINDS, logits

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


def prepared(way: str, folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder / ("sparse" if way == "loaded" else "stock"))
    assert {tuple(parameter.shape) for parameter in model.parameters()} == {(0,)}
    if way == "by hand":
        for block in find_blocks(model)[0]:
            owner, _, name = block.roles.act.rpartition(".")
            block.module.get_submodule(owner)._modules[name] = nn.ReLU()
    elif way == "patched":
        hf_sparse.patch(model, "relu")
    return model


def story(model: nn.Module) -> Tensor:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=model.parameters())
    engine.eval()
    found = [logits(engine, "torch")]
    for _ in range(2):
        engine.train()
        engine.backward(engine(input_ids=IDS, labels=IDS, use_cache=False).loss)
        engine.step()
        engine.eval()
        found.append(logits(engine, "torch"))
    return torch.stack(found)


def main() -> None:
    deepspeed_on_cpu()
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    context = HfDeepSpeedConfig(CONFIG)  # from_pretrained looks for it as long as it lives
    for kind in KINDS:
        folder = Path(sys.argv[1], kind)
        found = {way: story(prepared(way, folder)) for way in ("by hand", "loaded", "patched")}
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / "found.pt")
    del context
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
