"""One process of two that load a model with each layer split between them: ``python -m ... FOLDER``.

FOLDER has a folder for each kind of block, with a patched checkpoint, a stock one, and what logits to expect.
Rank 0 writes what it found there, by kind.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_sparse
from support.skips import CountSkips
from support.twins import IDS, KINDS, logits

PLANS: dict[str, Any] = {
    "llama": "auto",
    "mixtral": "auto",
    "opt": {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"},  # it has none
}


def load(kind: str, folder: Path) -> nn.Module:
    config = DistributedConfig(tp_size=2, tp_plan=PLANS[kind])
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def found(kind: str, folder: Path) -> dict[str, Any]:
    model = load(kind, folder / "sparse")
    with CountSkips() as skips:
        sparse = logits(model, "torch")
    split = sum("DTensor" in type(parameter).__name__ for parameter in model.parameters())
    with warnings.catch_warnings(record=True) as warned:
        model.save_pretrained(folder / "again")
    tokens = model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
    hf_sparse.unpatch(model)
    other = load(kind, folder / "stock")
    stock = logits(other, "torch")
    hf_sparse.patch(other, "relu")
    return {
        "logits": sparse,
        "split": split,
        "skips": skips.count,
        "tokens": tokens,
        "warned": [str(one.message) for one in warned],
        "stock": stock,
        "unpatched": logits(model, "torch"),
        "patched later": logits(other, "torch"),
        "patched anew": _patched_anew(other),
    }


def _patched_anew(model: nn.Module) -> Tensor:
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    hf_sparse.patch(model, "relu")
    return logits(model, "torch")


def main() -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        result = found(kind, Path(sys.argv[1], kind))
        if torch.distributed.get_rank() == 0:
            torch.save(result, Path(sys.argv[1], kind, "found.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
