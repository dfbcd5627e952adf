"""A gated MLP with an unmerged LoRA adapter: skipping against dense, both with the adapter, one token.

    python benchmarks/lora.py
    python benchmarks/lora.py --dtypes float32 --adapters gate down --sparsity 90 --rank 64

The blocks are those of a Llama, with random weights and a shifted ReLU that silences the wanted share of the
neurons of each token; the adapter is PEFT's, on one of the three projections, as PEFT makes it. "merged" is
without. Dense is the stock block with the same activation, skipping the block as ``hf_sparse.patch`` leaves
it, which decides for itself whether it skips. Calls cycle through as many layers as it takes to exceed the
cache; results are checked against float64 before any timing.

An adapter on gate or up leaves the down projection to skip: with a share p of active neurons the byte limit
is 3 / (2 + p). Under one on the down projection nothing skips.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import harness
import torch
from blocks import DTYPES, SHAPES, Shape, llama, quantile
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hf_sparse
import triton_ops
from hf_sparse.activations import ShiftedReLU

ADAPTERS = ("merged", "gate", "up", "down")


def main() -> None:
    parser = harness.parser(__doc__, repeats=15)
    parser.add_argument("--shape", type=Shape.of, default=SHAPES["llama-3.2-1b"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=ADAPTERS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 50, 90], help="silent neurons, %%")
    parser.add_argument("--layers", type=int, help="default: as many as make 512 MiB, at least 4")
    args = parser.parse_args()
    conditions = harness.begin(args)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in args.dtypes:
            for adapter in args.adapters:
                rows += measure(args, getattr(torch, name), adapter)
                harness.save(args.out, conditions, rows)
    print("written to", args.out)


def measure(args: argparse.Namespace, dtype: torch.dtype, adapter: str) -> list[dict[str, Any]]:
    """One row per sparsity."""
    stock = build(args, dtype, adapter)
    patched = copy.deepcopy(stock)
    inputs = [torch.randn(1, args.shape.hidden, device=args.device).to(dtype) for _ in mlps(stock)]
    rows = []
    for sparsity in args.sparsity:
        pairs = zip(mlps(stock), inputs, strict=True)
        shifts = [quantile(mlp.gate_proj(x), sparsity / 100) for mlp, x in pairs]
        for mlp, shift in zip(mlps(stock), shifts, strict=True):
            mlp.act_fn = ShiftedReLU(shift)
        hf_sparse.patch(patched, "shifted_relu", shift=shifts)
        rows.append(compare(args, stock, patched, inputs))
        rows[-1] |= {"dtype": str(dtype).removeprefix("torch."), "adapter": adapter, "rank": args.rank}
    print(harness.table([cells(row) for row in rows]), flush=True)
    return rows


def build(args: argparse.Namespace, dtype: torch.dtype, adapter: str) -> nn.Module:
    """A Llama with next to no attention, and the adapter on one projection of each MLP."""
    layer_bytes = 3 * args.shape.hidden * args.shape.neurons * dtype.itemsize
    layers = args.layers or max(4, -(-(512 << 20) // layer_bytes))
    model = llama(args.shape, layers, dtype, args.device).eval()
    if adapter != "merged":
        lora = LoraConfig(r=args.rank, target_modules=[f"{adapter}_proj"], init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
    return model.requires_grad_(False)


def mlps(model: Any) -> list[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [layer.mlp for layer in base.model.layers]


def compare(
    args: argparse.Namespace, stock: nn.Module, patched: nn.Module, inputs: list[Tensor]
) -> dict[str, Any]:
    runs = {
        name: harness.Run(
            [lambda c=case: c[0](c[1]) for case in zip(mlps(model), inputs, strict=True)],
            args.device,
            graph=False,
        )
        for name, model in (("dense", stock), ("skipping", patched))
    }
    first, x = mlps(stock)[0], inputs[0]
    exact = copy.deepcopy(first).double()(x.double())
    harness.check(runs["skipping"].outputs()[0], runs["dense"].outputs()[0], exact, "skipping")
    times, ratios = harness.interleaved(runs, args.repeats)
    active = [
        (mlp.act_fn(mlp.gate_proj(x)) != 0).float().mean().item()
        for mlp, x in zip(mlps(stock), inputs, strict=True)
    ]
    down: Any = mlps(patched)[0]._modules["down_proj"]  # as an attribute it would be given back
    return {
        "hidden": args.shape.hidden,
        "neurons": args.shape.neurons,
        "layers_cycled": len(inputs),
        "sparsity": round(1 - sum(active) / len(active), 4),
        "skips": "weight" in down._parameters and triton_ops.is_neuron_major(down._parameters["weight"]),
        "dense": times["dense"],
        "skipping": times["skipping"],
        "speedup": ratios["skipping"],
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    ratio = row["speedup"]
    return {
        "dtype": row["dtype"],
        "adapter": row["adapter"],
        "silent": f"{row['sparsity']:.0%}",
        "skips": "yes" if row["skips"] else "no",
        "dense ms": f"{row['dense'].median_ms:.2f}",
        "skipping ms": f"{row['skipping'].median_ms:.2f}",
        "ratio": f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
    }


if __name__ == "__main__":
    main()
