"""One process of a training that skips in its evaluations: ``python -m support.sharded FILE FAMILY``.

``story`` is what is trained; rank 0 writes its logits for each way of data parallelism into FILE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import hf_sparse
from support.models import tiny

IDS = torch.arange(3, 67).view(4, 16) % 128


def patched(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny(family, num_hidden_layers=2, tie_word_embeddings=False)
    for module in model.modules():  # so that all ways drop the same: nothing
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    hf_sparse.patch(model, "relu")
    return model


def logits(model: nn.Module, backend: str) -> Tensor:
    model.eval()
    with torch.no_grad(), hf_sparse.backend(backend):
        return model(input_ids=IDS[:1, :1], use_cache=False).logits.flatten()


def story(model: nn.Module, own: Tensor, backend: str) -> Tensor:
    """Logits ``[4, V]`` before and after each of three updates; ``own [B, S]`` is this process's text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = [logits(model, backend)]
    for _ in range(3):
        model.train()
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if backend != "dense" and hasattr(model, "config"):  # not wrapped
            hf_sparse.measure(model, [{"input_ids": own}])
        found.append(logits(model, backend))
    return torch.stack(found)


def layers(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(layers(model)[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def after_skipping(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        logits(model, "torch")
        return wrap(model)

    return wrapped


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": ddp,
    "ddp after skipping": after_skipping(ddp),
    "fsdp1": fsdp1,
    "fsdp1 after skipping": after_skipping(fsdp1),
    "fsdp2": fsdp2,
    "fsdp2 after skipping": after_skipping(fsdp2),
}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    own = IDS[2 * rank : 2 * rank + 2]
    found = {way: story(wrap(patched(sys.argv[2])), own, "torch") for way, wrap in WAYS.items()}
    if rank == 0:
        torch.save(found, sys.argv[1])
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
