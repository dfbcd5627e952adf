"""A layer of stacked experts: skipping inside of each routed expert, against transformers' dense ways.

    python benchmarks/experts.py
    python benchmarks/experts.py --shape 2048x768 --experts 128 --top-k 8 --tokens 1 --sparsity 90

The layer is transformers' own (``OlmoeExperts``) with random weights and a FATReLU threshold that silences
the wanted share of the neurons of each token. Dense is the same function by each ``experts_implementation``
of transformers; the ratio is against the fastest of them. Tokens are routed so that calls go through all
experts in turn, which takes them out of the caches. Results are checked against float64 before any timing.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import harness
import torch
from blocks import DTYPES, Shape
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import triton_ops
from hf_sparse.activations.relu_family import FATReLU
from hf_sparse.adapters.experts import Routed
from hf_sparse.adapters.shapes import recognise
from hf_sparse.modules import SparseExperts

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def build(args: argparse.Namespace, dtype: torch.dtype) -> OlmoeExperts:
    config = OlmoeConfig(
        hidden_size=args.shape.hidden,
        intermediate_size=args.shape.neurons,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
    )
    experts = OlmoeExperts(config).to(dtype).to(args.device).eval()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return experts.requires_grad_(False)


def calls(args: argparse.Namespace, dtype: torch.dtype, tokens: int) -> list[Routed]:
    """As many as it takes for every expert to be routed to."""
    found = []
    for _ in range(max(1, args.experts // (args.top_k * tokens))):
        x = torch.randn(tokens, args.shape.hidden).to(args.device, dtype)
        weights = torch.rand(tokens, args.top_k).softmax(-1).to(args.device, dtype)
        found.append(Routed(x, torch.empty(0), weights))
    order = torch.cat([torch.randperm(args.experts) for _ in range(len(found) * tokens)])
    rows = order[: len(found) * tokens * args.top_k].view(len(found), tokens, args.top_k)
    return [call._replace(experts=row.to(args.device)) for call, row in zip(found, rows, strict=True)]


def threshold(experts: OlmoeExperts, call: Routed, sparsity: float) -> float:
    """The pre-activation below which lies the wanted share, for the experts of a call."""
    found: list[Tensor] = []
    handle = experts.act_fn.register_forward_hook(lambda _, args, output: found.append(args[0].flatten()))
    experts(*call)
    handle.remove()
    return max(torch.cat(found).float().quantile(sparsity).item(), 0.0)


def main() -> None:
    parser = harness.parser(__doc__, repeats=15)
    parser.add_argument("--shape", type=Shape.of, default=Shape.of("2048x1024"), help="of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[50, 90], help="silent neurons, %%")
    args = parser.parse_args()
    conditions = harness.begin(args)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in args.dtypes:
            rows += measure(args, getattr(torch, name))
    print(harness.table([cells(row) for row in rows]))
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    stock = build(args, dtype)
    rows = []
    for tokens in args.tokens:
        work = calls(args, dtype, tokens)
        for sparsity in args.sparsity:
            rows.append(compare(args, stock, work, sparsity / 100))
            print(harness.table([cells(rows[-1])]), flush=True)
    return rows


def compare(
    args: argparse.Namespace, stock: OlmoeExperts, work: list[Routed], sparsity: float
) -> dict[str, Any]:
    """One row. What it makes is gone afterwards: weights that somebody else holds are not skipped."""
    stock.config._experts_implementation = "eager"
    stock.act_fn = act = FATReLU(threshold(stock, work[0], sparsity))
    skipping = sparse(stock)
    runs = {way: timed([dense(stock, call, way) for call in work], args) for way in IMPLEMENTATIONS}
    runs["skipping"] = timed([run(skipping, call) for call in work], args)
    gate(stock, work[0], runs)
    if not triton_ops.is_neuron_major(skipping._parameters[skipping.roles.down]):
        raise SystemExit("nothing was skipped, no timing")
    times, _ = harness.interleaved(runs, args.repeats)
    best = min(IMPLEMENTATIONS, key=lambda way: times[way].median_ms)
    times, ratios = harness.interleaved({name: runs[name] for name in (best, "skipping")}, args.repeats)
    return {
        "tokens": len(work[0].x),
        "sparsity": round(silent(stock, work, act), 4),
        "dense": best,
        "dense_ms": times[best],
        "skipping_ms": times["skipping"],
        "speedup": ratios["skipping"],
        "hidden": args.shape.hidden,
        "neurons": args.shape.neurons,
        "experts": args.experts,
        "top_k": args.top_k,
        "dtype": str(work[0].x.dtype).removeprefix("torch."),
    }


def timed(work: list[Any], args: argparse.Namespace) -> harness.Run:
    return harness.Run(work, args.device, graph=False)


def sparse(stock: OlmoeExperts) -> SparseExperts:
    """A patched copy, whose weights are stored otherwise."""
    own = copy.deepcopy(stock)
    roles = recognise(own)
    assert roles is not None
    return SparseExperts(own, roles, stock.act_fn)


def dense(experts: OlmoeExperts, call: Routed, way: str) -> Any:
    def once() -> Tensor:
        experts.config._experts_implementation = way
        return experts(*call)

    return once


def run(experts: SparseExperts, call: Routed) -> Any:
    return lambda: experts(*call)


def gate(stock: OlmoeExperts, call: Routed, runs: dict[str, harness.Run]) -> None:
    """Wrong results are not timed."""
    stock.config._experts_implementation = "eager"
    expected = stock(*call)
    exact = copy.deepcopy(stock).double()(call.x.double(), call.experts, call.weights.double())
    for name, one in runs.items():
        harness.check(one.outputs()[0], expected, exact, name)


def silent(stock: OlmoeExperts, work: list[Routed], act: FATReLU) -> float:
    """Share of neurons of routed experts that are exactly zero."""
    shares: list[float] = []
    handle = act.register_forward_hook(lambda _, args, a: shares.append((a == 0).float().mean().item()))
    stock.config._experts_implementation = "eager"
    for call in work:
        stock(*call)
    handle.remove()
    return sum(shares) / len(shares)


def cells(row: dict[str, Any]) -> dict[str, str]:
    ratio = row["speedup"]
    return {
        "dtype": row["dtype"],
        "tokens": str(row["tokens"]),
        "silent": f"{row['sparsity']:.0%}",
        "dense": row["dense"],
        "dense ms": f"{row['dense_ms'].median_ms:.2f}",
        "skipping ms": f"{row['skipping_ms'].median_ms:.2f}",
        "ratio": f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
    }


if __name__ == "__main__":
    main()
