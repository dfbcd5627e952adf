"""One of two processes that load a model for FSDP2 and patch it: ``python -m support.sharded_load FOLDER``.

Each writes there how much memory loading took, in MiB, what it has after it was sharded, and a dense model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import hf_sparse
from support.models import untrained_llama
from support.sharded_run import fsdp_on_cpu

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
MIB = 2**20


def memory() -> int:
    """What this process has written to, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def main() -> None:
    os.environ.update(SETTINGS)
    sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
    from finetune import dense as load_dense
    from loading import load
    from recipe import Recipe
    from sharding import reads_no_weights

    fsdp_on_cpu()
    accelerator = Accelerator()
    folder, rank = Path(sys.argv[1]), accelerator.process_index
    recipe = Recipe(model=str(folder / "model"))
    if rank == 0:
        model = untrained_llama(hidden_size=512, vocab_size=16_000, tie_word_embeddings=True)
        model.to(torch.bfloat16).save_pretrained(recipe.model)
        del model
    accelerator.wait_for_everyone()
    before = memory()
    model = load(recipe, empty=reads_no_weights(accelerator))
    hf_sparse.patch(model, hf_sparse.SparsityConfig(activation="relu", zeroth_bias={"positions": 8}))
    needed = memory() - before
    dense = load_dense(recipe, accelerator)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    found = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    found |= {f"dense {name}": parameter.detach() for name, parameter in dense.named_parameters()}
    torch.save((needed / MIB, found), folder / f"{rank}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
