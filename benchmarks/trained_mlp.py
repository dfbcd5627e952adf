"""A training step of one MLP, forward and backward: computing only what is active, against dense.

    python benchmarks/trained_mlp.py
    python benchmarks/trained_mlp.py --shapes 576x1536 --dtypes float32 --sparsity 90 95 --tokens 1024

The blocks are those of a Llama, with random weights and a shifted ReLU that silences the wanted share of the
neurons. Dense is the stock block with that activation as torch trains it; skipping is the same block after
``hf_sparse.patch`` and ``hf_sparse.skip_in_training``. A call is a forward and the backward pass, to the
gradients of the input and of the three weights; what is kept between the two is counted. Gradients are
checked against float64 before any timing.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import harness
import torch
from blocks import DTYPES, SHAPES, Shape, llama, quantile
from torch import Tensor, nn

import hf_sparse
from hf_sparse.activations import ShiftedReLU

SMALL = "576x1536"  # of SmolLM2-135M


def main() -> None:
    parser = harness.parser(__doc__, repeats=7)
    shapes = [Shape.of(SMALL), SHAPES["llama-3.2-1b"]]
    parser.add_argument("--shapes", nargs="+", type=Shape.of, default=shapes, metavar="SHAPE")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[80, 90, 95, 98], help="silent, %%")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    conditions = harness.begin(args)
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for name in args.dtypes:
            for sparsity in args.sparsity:
                rows.append(measure(args, shape, getattr(torch, name), sparsity / 100))
                print(harness.table([cells(rows[-1])]), flush=True)
                harness.save(args.out, conditions, rows)
    print("written to", args.out)


def measure(args: argparse.Namespace, shape: Shape, dtype: torch.dtype, sparsity: float) -> dict[str, Any]:
    stock = llama(shape, 1, dtype, args.device).train()
    x = torch.randn(args.tokens, shape.hidden, device=args.device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    mlp: Any = stock.model.layers[0].mlp
    with torch.no_grad():
        shift = quantile(mlp.gate_proj(x[:256]), sparsity)
    mlp.act_fn = ShiftedReLU(shift)
    patched: Any = copy.deepcopy(stock)
    hf_sparse.patch(patched, "shifted_relu", shift=shift)
    hf_sparse.skip_in_training(patched, 1.0)
    blocks = {"dense": mlp, "skipping": patched.model.layers[0].mlp}
    exact = gradients(copy.deepcopy(mlp).double(), x.detach().double().requires_grad_(), grad.double())
    found = {name: gradients(block, x, grad) for name, block in blocks.items()}
    for mine, theirs, right in zip(found["skipping"], found["dense"], exact, strict=True):
        harness.check(mine, theirs, right, "a gradient of skipping")
    runs = {
        name: harness.Run([lambda block=block: gradients(block, x, grad)], args.device, graph=False)
        for name, block in blocks.items()
    }
    times, ratios = harness.interleaved(runs, args.repeats)
    with torch.no_grad():
        active = (mlp.act_fn(mlp.gate_proj(x)) != 0).float().mean().item()
    products = 9 * 2 * args.tokens * shape.hidden * shape.neurons
    return {
        "shape": shape.name,
        "hidden": shape.hidden,
        "neurons": shape.neurons,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "sparsity": round(1 - active, 4),
        "dense": times["dense"],
        "skipping": times["skipping"],
        "speedup": ratios["skipping"],
        "dense_gflop_per_s": round(products / times["dense"].median_ms / 1e6, 1),
        "dense_kept_mib": kept(mlp, x),
        "skipping_kept_mib": kept(blocks["skipping"], x),
    }


def gradients(block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Of the input and of the weights."""
    return list(torch.autograd.grad(block(x), [x, *block.parameters()], grad))


def kept(block: nn.Module, x: Tensor) -> float:
    """MiB that are kept for the backward pass, beside the input and the weights."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    for there in (x, *block.parameters()):
        sizes.pop(there.untyped_storage().data_ptr(), None)
    del y
    return round(sum(sizes.values()) / 2**20, 1)


def cells(row: dict[str, Any]) -> dict[str, str]:
    ratio = row["speedup"]
    return {
        "shape": row["shape"],
        "dtype": row["dtype"],
        "silent": f"{row['sparsity']:.0%}",
        "dense ms": f"{row['dense'].median_ms:.1f}",
        "skipping ms": f"{row['skipping'].median_ms:.1f}",
        "ratio": f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
        "kept MiB": f"{row['dense_kept_mib']:.0f} to {row['skipping_kept_mib']:.0f}",
    }


if __name__ == "__main__":
    main()
