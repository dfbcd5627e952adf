"""Greedy ``generate()`` of a randomly initialised Llama-3.2-1B: skipping against dense, end to end.

    python benchmarks/generate.py --certify
    python benchmarks/generate.py --new-tokens 64 --repeats 9
    python benchmarks/generate.py --batch 4

The models share every weight but the down projections, which skipping stores neuron by neuron: the unpatched
SiLU model, the patched one run dense, the patched one run as the package chooses and, with ``--certify``, the
same with certified skip. Each layer gets the FATReLU threshold that silences the wanted share of its neurons
on random prompts.

Random weights do not change what a step costs, which depends on shapes and sparsity alone. They do make the
logits of 128256 tokens nearly equal, so that in bfloat16 greedy tokens soon differ by rounding. Therefore,
before any timing, the logits of all forms are compared with those of the same model in float32: skipping must
not be clearly further off than dense. With ``--dtype float32`` the tokens are equal.

On a GPU a step of eager ``generate()`` waits for the host, and not for memory; ``--static-cache`` lets
transformers compile it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from blocks import DTYPES, Shape, quantile
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_sparse
import triton_ops
from hf_sparse.adapters import find_blocks

SKIPPING = ("patched, sparse", "patched, certified")


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    """The shape of Llama-3.2-1B unless told otherwise, with random weights."""
    hidden = args.shape.hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=args.shape.neurons,
        num_hidden_layers=args.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        head_dim=64,
        vocab_size=args.vocab,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options of who takes a folder of a model, or builds one of random weights."""
    parser.add_argument("--model", type=Path, help="folder of a model; default: random weights")
    parser.add_argument("--shape", type=Shape.of, default=Shape.of("llama-3.2-1b"))
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")


def model_of(args: argparse.Namespace) -> Any:
    """The one that these options say."""
    if args.model is None:
        return build(args)
    dtype = getattr(torch, args.dtype)
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()


def thresholds(model: LlamaForCausalLM, prompt: Tensor, sparsity: float) -> tuple[float, ...]:
    """Per layer, the quantile of the gate's pre-activations when the layers before are already sparse."""
    found: dict[str, float] = {}
    values: tuple[float, ...] = ()
    # The thresholds of one layer change the input of the next: repeat until they are each other's.
    for _ in range(3):
        if values:
            hf_sparse.patch(model, "fatrelu", threshold=values)
        blocks, _ = find_blocks(model)
        hooks = [
            block.watch(
                "p", lambda p, _, name=block.name: found.__setitem__(name, max(quantile(p, sparsity), 0.0))
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
        block.watch("h", lambda h, _: shares.append((h[:, first:] == 0).float().mean().item()))
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


def check_logits(
    dense: nn.Module, sparse: dict[str, nn.Module], tokens: Tensor, first: int, backend: str
) -> dict[str, float]:
    """Root mean square errors of the logits against float32, in standard deviations, dense first.

    Raises:
        SystemExit: one of ``sparse`` is clearly worse than dense.

    """
    tokens = tokens[:, : first + 8]
    exact = logits(copy.deepcopy(dense).float(), tokens, first, "dense")

    def error(model: nn.Module, backend: str) -> float:
        return ((logits(model, tokens, first, backend) - exact).square().mean().sqrt() / exact.std()).item()

    errors = {"patched, dense": error(dense, "dense")}
    for name, model in sparse.items():
        errors[name] = error(model, backend)
        if not errors[name] <= 1.5 * errors["patched, dense"] + 1e-4:
            raise SystemExit(f"wrong result, no timing: {name}: logits off by {errors}")
    return errors


def models(args: argparse.Namespace, prompt: Tensor) -> dict[str, LlamaForCausalLM]:
    """The competitors by name; they share what memory they can."""
    stock = build(args)
    threshold = thresholds(stock, prompt, args.sparsity)

    def copied(model: LlamaForCausalLM, own: str | None = None) -> LlamaForCausalLM:
        # A memo of parameters makes deepcopy share them.
        shared = {id(p): p for name, p in model.named_parameters() if own is None or own not in name}
        return copy.deepcopy(model, shared)

    dense = copied(stock)
    sparse = copied(stock, own="down_proj")  # for a layout of its own
    certified = copied(sparse) if args.certify else None
    hf_sparse.patch(dense, "fatrelu", threshold=threshold)
    hf_sparse.patch(sparse, "fatrelu", threshold=threshold)
    found = {"patched, dense": dense, "stock SiLU": stock, "patched, sparse": sparse}
    if certified is not None:
        hf_sparse.patch(certified, "fatrelu", threshold=threshold)
        hf_sparse.prepare(certified, certify=True)
        found["patched, certified"] = certified
    return found


def generation(
    model: LlamaForCausalLM, prompt: Tensor, backend: str, args: argparse.Namespace, **options: Any
) -> Callable[[], Tensor]:
    """The call that is timed; ``options`` of ``generate()`` besides."""
    if args.static_cache:
        options["cache_implementation"] = "static"
    model.generation_config.eos_token_id = None  # each time so many new tokens

    def call() -> Tensor:
        with torch.inference_mode(), hf_sparse.backend(backend):
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=args.new_tokens,
                do_sample=False,
                **options,
            )

    return call


def speed(name: str, timing: harness.Timing, ratio: harness.Ratio, tokens: int) -> dict[str, Any]:
    """What a row says of a call that gives so many ``tokens``."""
    return {
        "model": name,
        "generate": timing,
        "tokens_per_s": round(tokens / timing.median_ms * 1e3, 2),
        "speedup": round(ratio.median, 3),
        "speedup_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
    }


def speed_cells(row: dict[str, Any]) -> dict[str, str]:
    """The same in words, with the sparsity of the row."""
    low, high = row["speedup_quartiles"]
    return {
        "model": row["model"],
        "sparsity": f"{row['sparsity']:.1%}",
        "tokens/s": f"{row['tokens_per_s']:.2f}",
        "speed-up": f"{row['speedup']:.2f} ({low:.2f}-{high:.2f})",
    }


def main() -> None:
    parser = harness.parser(__doc__, repeats=5)
    parser.add_argument(
        "--shape", type=Shape.of, default=Shape.of("llama-3.2-1b"), help="of the MLPs, or like 128x192"
    )
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of silent neurons")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--certify", action="store_true", help="one competitor more: certified skip")
    parser.add_argument("--static-cache", action="store_true")
    parser.add_argument("--backend", choices=triton_ops.BACKENDS, default="auto", help="of the sparse models")
    args = parser.parse_args()
    conditions = harness.begin(args)

    prompt = torch.randint(1, args.vocab, (args.batch, args.prompt_tokens), device=args.device)
    found = models(args, prompt)
    backends = {name: args.backend if name in SKIPPING else "dense" for name in found}
    runs = {
        name: harness.Run([generation(model, prompt, backends[name], args)], args.device, graph=False)
        for name, model in found.items()
    }
    # The gate before any number, and the warm-up.
    tokens = {name: run.outputs()[0] for name, run in runs.items()}
    expected = tokens["patched, dense"]
    sparse = {name: model for name, model in found.items() if name in SKIPPING}
    errors = check_logits(found["patched, dense"], sparse, expected, args.prompt_tokens, args.backend)
    silent = silent_share(found["patched, dense"], tokens["patched, sparse"], args.prompt_tokens)
    times, ratios = harness.interleaved(runs, args.repeats)

    rows = []
    for name, timing in times.items():
        same = (tokens[name] == expected)[:, args.prompt_tokens :].int().cumprod(1).sum(1)
        rows.append(
            {
                **speed(name, timing, ratios[name], args.batch * args.new_tokens),
                "sparsity": round(silent, 4) if name != "stock SiLU" else 0.0,
                "batch": args.batch,
                "prompt_tokens": args.prompt_tokens,
                "new_tokens": args.new_tokens,
                "hidden": args.shape.hidden,
                "neurons": args.shape.neurons,
                "layers": args.layers,
                "dtype": args.dtype,
                "same_greedy_tokens_as_dense": same.tolist() if name in SKIPPING else None,
                "same_tokens_as_uncertified": (
                    torch.equal(tokens[name], tokens["patched, sparse"]) if "certified" in name else None
                ),
                "logit_error": errors.get(name),
            }
        )
    print(harness.table([cells(row) for row in rows]))
    if args.certify:
        equal = "the same" if rows[-1]["same_tokens_as_uncertified"] else "OTHER"
        print(f"certified gives {equal} tokens as uncertified")
    print(f"{silent:.1%} silent while decoding, {args.batch} at once, {args.new_tokens} new tokens")
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def cells(row: dict[str, Any]) -> dict[str, str]:
    timing, same, error = row["generate"], row["same_greedy_tokens_as_dense"], row["logit_error"]
    return {
        "model": row["model"],
        "seconds": f"{timing.median_ms / 1e3:.2f}",
        "quartiles": f"{timing.low_ms / 1e3:.2f}-{timing.high_ms / 1e3:.2f}",
        "tokens/s": f"{row['tokens_per_s']:.2f}",
        "speedup": f"{row['speedup']:.2f}x",
        "first equal tokens": "" if same is None else str(min(same)),
        "logits off float32": "" if error is None else f"{error:.4f}",
    }


if __name__ == "__main__":
    main()
