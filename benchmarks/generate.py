"""End-to-end decoding of a Llama-3.2-1B-shaped model whose MLPs are 90 % sparse: dense against skipping.

    python benchmarks/generate.py --json benchmarks/results/generate.json

The weights are random (speed does not depend on their values); architecture, dtype and code path are those
of the real model: ``generate()`` with the KV cache, batch 1, greedy. FATReLU thresholds are set, layer by
layer, to the quantile of the gate pre-activations that gives the wanted sparsity on a random prompt; the
sparsity reached while decoding is measured and printed.

Compared by turns in one process: the stock model (SiLU), the patched model run dense, and the patched model
as it runs by itself. The two dense ones have the stock memory layout; the baseline is the faster of them.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from harness import by_turns, save, speedup, spread
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse.adapters import find_blocks

SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def build(shape: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A randomly initialised model in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, eos_token_id=None, dtype=dtype)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def thresholds(model: LlamaForCausalLM, prompt: torch.Tensor, sparsity: float) -> tuple[float, ...]:
    """For each MLP, the quantile of its gate pre-activations on ``prompt``."""
    found: list[float] = []
    blocks, _ = find_blocks(model)

    def catch(_: object, __: object, gate: torch.Tensor) -> torch.Tensor:
        t = float(gate.float().flatten().kthvalue(int(sparsity * gate.numel())).values)
        found.append(max(t, 0.0))
        return gate

    hooks = [block.gate_linear.register_forward_hook(catch) for block in blocks]
    model(prompt)
    for hook in hooks:
        hook.remove()
    return tuple(found)


@torch.no_grad()
def next_logits(model: LlamaForCausalLM, prompt: torch.Tensor, backend: str) -> torch.Tensor:
    """Logits after ``prompt`` with the last token decoded by itself, as ``generate`` does."""
    with hf_sparse.backend(backend):
        cache = model(prompt[:, :-1], use_cache=True).past_key_values
        return model(prompt[:, -1:], past_key_values=cache).logits.float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of silent neurons to set")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens in each timing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="backend of the skipping model")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    stock = build(options.shape, dtype, options.device)
    prompt = torch.randint(0, stock.config.vocab_size, (1, 32), device=options.device)
    dense, sparse = copy.deepcopy(stock), copy.deepcopy(stock)
    config = hf_sparse.SparsityConfig(
        activation="fatrelu", threshold=thresholds(stock, prompt, options.sparsity)
    )
    hf_sparse.patch(dense, config)
    print(hf_sparse.patch(sparse, config))

    def decode(model: LlamaForCausalLM, backend: str, count: int = options.tokens) -> torch.Tensor:
        with hf_sparse.backend(backend):
            return model.generate(
                prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )

    # Correct first: the same logits up to rounding, and the sparsity of the very tokens that are timed. In
    # bfloat16 random weights give near-ties, which rounding decides, so the tokens may come to differ.
    logits = [next_logits(dense, prompt, "dense"), next_logits(sparse, prompt, options.backend)]
    difference = float((logits[0] - logits[1]).norm() / logits[0].norm())
    if not difference <= (2e-2 if dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"wrong result: the logits differ by {difference:.1e} of their norm")
    tokens = decode(dense, "dense")
    same = torch.equal(tokens, decode(sparse, options.backend))
    report = hf_sparse.measure(dense, [{"input_ids": tokens}])
    print(
        f"sparsity {report.sparsity:.1%}; dense and skipping: logits differ by {difference:.1e} of their "
        f"norm, greedy tokens {'equal' if same else 'differ'}"
    )

    seconds = by_turns(
        {
            "stock (SiLU)": lambda: decode(stock, "dense"),
            "patched, dense": lambda: decode(dense, "dense"),
            "patched, skipping": lambda: decode(sparse, options.backend),
        },
        rounds=options.rounds,
        warmup=1,
    )
    best = min(("stock (SiLU)", "patched, dense"), key=lambda name: spread(seconds[name])["median"])
    rows = []
    print(f"\n{'':20} {'tokens/s':>9} {'p10':>7} {'p90':>7} {'against ' + best:>26}")
    for name, values in seconds.items():
        rate = spread([options.tokens / s for s in values])
        ratio = speedup(seconds[best], values)
        rows.append({"model": name, "tokens_per_second": rate, "speedup": ratio, "baseline": best})
        print(
            f"{name:20} {rate['median']:9.2f} {rate['p10']:7.2f} {rate['p90']:7.2f} {ratio['median']:25.2f}x"
        )
    setting = {k: v for k, v in vars(options).items() if k != "json"}
    found = {"measured_sparsity": report.sparsity, "logit_difference": difference, "same_tokens": same}
    save("generate", [{**setting, **found}, *rows], options.json)


if __name__ == "__main__":
    main()
