"""Greedy ``generate()`` of a randomly initialised Llama-3.2-1B: skipping against dense, end to end.

    python benchmarks/generate.py
    python benchmarks/generate.py --new_tokens 64 --repeats 9

Three models share every weight but the down projections, which skipping stores neuron by neuron: the
unpatched SiLU model, the patched one run dense, and the patched one run as the package chooses. Each layer
gets the FATReLU threshold that silences the wanted share of its neurons on a random prompt.

Random weights do not change what a step costs, which depends on shapes and sparsity alone. They do make the
logits of 128256 tokens nearly equal, so that in bfloat16 greedy tokens soon differ by rounding. Therefore,
before any timing, the logits of both forms are compared with those of the same model in float32: skipping
must not be further off than dense. With ``--dtype float32`` the tokens are equal.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from harness import interleaved, provenance, save, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse.adapters import find_blocks


def build(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """The shape of Llama-3.2-1B, with random weights."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def thresholds(model: LlamaForCausalLM, prompt: Tensor, sparsity: float) -> tuple[float, ...]:
    """Per layer, the quantile of the gate's pre-activations when the layers before are already sparse."""
    found: dict[str, float] = {}
    values: tuple[float, ...] = ()
    # The thresholds of one layer change the input of the next: repeat until they are each other's.
    for _ in range(3):
        if values:
            hf_sparse.patch(model, hf_sparse.SparsityConfig(activation="fatrelu", threshold=values))
        blocks, _ = find_blocks(model)
        hooks = [
            block.gate_linear.register_forward_hook(
                lambda _m, _i, out, name=block.name: found.__setitem__(
                    name, max(torch.quantile(out.float().flatten(), sparsity).item(), 0.0)
                )
            )
            for block in blocks
        ]
        with torch.no_grad(), hf_sparse.backend("dense"):
            model(prompt)
        for hook in hooks:
            hook.remove()
        if values:
            hf_sparse.unpatch(model)
        values = tuple(found[block.name] for block in blocks)
    return values


def silent_share(model: nn.Module, tokens: Tensor, first: int) -> float:
    """Share of exact zeros that reach the down projections, over the tokens from ``first`` on."""
    shares = []
    blocks, _ = find_blocks(model)
    hooks = [
        block.down_linear.register_forward_pre_hook(
            lambda _m, args: shares.append((args[0][:, first:] == 0).float().mean().item())
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return sum(shares) / len(shares)


def logits(model: nn.Module, tokens: Tensor, first: int, backend: str) -> Tensor:
    """In float32, of every token from ``first`` on, decoded one by one with a cache."""
    steps = []
    with torch.inference_mode(), hf_sparse.backend(backend):
        out = model(tokens[:, :first], use_cache=True)
        for i in range(first, tokens.shape[1]):
            out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits.float())
    return torch.cat(steps, 1)


def check_logits(dense: nn.Module, sparse: nn.Module, tokens: Tensor, first: int) -> tuple[float, float]:
    """Root mean square errors of dense and sparse logits against float32, in standard deviations.

    Raises:
        SystemExit: sparse is clearly worse.

    """
    tokens = tokens[:, : first + 8]
    exact = logits(copy.deepcopy(dense).float(), tokens, first, "dense")

    def error(model: nn.Module, backend: str) -> float:
        return ((logits(model, tokens, first, backend) - exact).square().mean().sqrt() / exact.std()).item()

    dense_error, sparse_error = error(dense, "dense"), error(sparse, "auto")
    if not sparse_error <= 1.5 * dense_error + 1e-4:
        raise SystemExit(
            f"wrong result, no timing: logits off by {sparse_error:.3g}, dense {dense_error:.3g}"
        )
    return dense_error, sparse_error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of silent neurons")
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/generate.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    conditions = provenance()
    print(", ".join(f"{k} {v}" for k, v in conditions.items() if v is not None), flush=True)

    stock = build(args.layers, getattr(torch, args.dtype))
    prompt = torch.randint(1, stock.config.vocab_size, (1, args.prompt_tokens))
    config = hf_sparse.SparsityConfig(
        activation="fatrelu", threshold=thresholds(stock, prompt, args.sparsity)
    )
    # A memo of parameters makes deepcopy share them; the down projections get a layout of their own.
    shared = dict(stock.named_parameters())
    dense = copy.deepcopy(stock, {id(p): p for p in shared.values()})
    sparse = copy.deepcopy(stock, {id(p): p for name, p in shared.items() if "down_proj" not in name})
    hf_sparse.patch(dense, config)
    hf_sparse.patch(sparse, config)

    def generate(model: LlamaForCausalLM, backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode(), hf_sparse.backend(backend):
                return model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=args.new_tokens,
                    min_new_tokens=args.new_tokens,
                    do_sample=False,
                )

        return call

    names = {
        "stock SiLU": (stock, "dense"),
        "patched, dense": (dense, "dense"),
        "patched, sparse": (sparse, "auto"),
    }
    calls = {name: [generate(*spec)] for name, spec in names.items()}
    # The gate before any number, and the warm-up: both forms of the patched model say the same.
    tokens = {name: call[0]() for name, call in calls.items()}
    expected, actual = tokens["patched, dense"], tokens["patched, sparse"]
    same = int((expected == actual)[0].int().cumprod(0).sum()) - args.prompt_tokens
    dense_error, sparse_error = check_logits(dense, sparse, expected, args.prompt_tokens)
    silent = silent_share(dense, actual, args.prompt_tokens)
    times, _ = interleaved(calls, args.repeats)

    rows = []
    for name, timing in times.items():
        rows.append(
            {
                "model": name,
                "generate": timing,
                "tokens_per_s": round(args.new_tokens / timing.median_ms * 1e3, 2),
                "speedup": round(times["patched, dense"].median_ms / timing.median_ms, 3),
                "sparsity": round(silent, 4) if name != "stock SiLU" else 0.0,
                "prompt_tokens": args.prompt_tokens,
                "new_tokens": args.new_tokens,
                "layers": args.layers,
                "dtype": args.dtype,
                "same_greedy_tokens_as_dense": same if name == "patched, sparse" else None,
                "logit_error": {"patched, dense": dense_error, "patched, sparse": sparse_error}.get(name),
            }
        )
    print(_table(rows))
    print(
        f"{silent:.1%} silent while decoding; the first {same} of {args.new_tokens} greedy tokens are equal;"
    )
    print(f"logits off float32 by {dense_error:.4f} (dense) and {sparse_error:.4f} (sparse) deviations")
    print("written to", save("generate", conditions, rows, args.out))


def _table(rows: list[dict[str, object]]) -> str:
    head = ["model", "seconds", "quartiles", "tokens/s", "speedup"]
    body = [
        [
            str(row["model"]),
            f"{row['generate'].median_ms / 1e3:.2f}",
            f"{row['generate'].low_ms / 1e3:.2f}-{row['generate'].high_ms / 1e3:.2f}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in rows
    ]
    return table([head, *body])


if __name__ == "__main__":
    main()
