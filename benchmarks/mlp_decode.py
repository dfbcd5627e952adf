"""One token through the gated MLPs of a model: skipping against dense PyTorch in the same dtype.

    python benchmarks/mlp_decode.py --json benchmarks/results/mlp_decode.json

Every timing goes through several layers with weights of their own, many times the size of the caches, as
decoding does: no weight is still in the cache when its turn comes again. The dense baseline is torch's own
linear layers in the stock memory layout. Both are called by turns in one process, the skipping one through
the public function, Python and dispatch included.

"of limit" is the speed-up as a share of what the bytes allow: 3 / (1 + 2p) for a share p of active neurons,
if dense ran at the full bandwidth of the memory. "GB/s" is the rate at which dense reads its weights.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import by_turns, save, speedup, spread
from torch import Tensor

import triton_ops
from triton_ops import reference

SHAPES = {"llama-3.2-1b": (2048, 8192), "llama-2-7b": (4096, 11008), "tiny": (64, 256)}
WORKING_SET = 1 << 29
"""Bytes of weights to go through before one is used again: 16 times a large L3 cache."""


@dataclass
class Layer:
    """A gated MLP, its input and the shift below which a neuron is silent."""

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    shift: float = 0.0

    def dense(self) -> Tensor:
        """As a stock module computes it."""
        a = torch.relu(F.linear(self.x, self.gate) - self.shift)
        return F.linear(a * F.linear(self.x, self.up), self.down)

    def skipping(self, down: Tensor) -> Tensor:
        """As a patched module computes it."""
        if not triton_ops.wants_sparse(1, self.gate, gated=True):
            return self.dense()
        return triton_ops.gated_mlp(
            self.x, self.gate, self.up, down, activation="shifted_relu", threshold=self.shift
        )


def build(hidden: int, neurons: int, dtype: torch.dtype, device: str) -> list[Layer]:
    """Layers of random weights, enough to fill WORKING_SET, with pre-activations of unit variance."""
    torch.manual_seed(0)
    count = max(2, -(-WORKING_SET // (3 * hidden * neurons * dtype.itemsize)))
    if hidden < 256:
        count = 2

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

    return [
        Layer(
            torch.randn(1, hidden, device=device).to(dtype),
            weight(neurons, hidden),
            weight(neurons, hidden),
            weight(hidden, neurons),
        )
        for _ in range(count)
    ]


def set_sparsity(layer: Layer, sparsity: float) -> None:
    """Choose the shift so that this share of the neurons is silent for the layer's input."""
    p = F.linear(layer.x, layer.gate).float().flatten()
    k = round(sparsity * p.numel())
    layer.shift = float(p.kthvalue(k).values) if k else float(p.min()) - 1


def check(layer: Layer, down: Tensor) -> None:
    """Refuse to time what is wrong: an error over twice the dense one, against float64."""
    exact = reference.gated_mlp(
        *(t.double() for t in (layer.x, layer.gate, layer.up, layer.down)),
        activation="shifted_relu",
        threshold=layer.shift,
    )
    dense, ours = (
        float((y.double() - exact).norm() / exact.norm()) for y in (layer.dense(), layer.skipping(down))
    )
    if not ours <= 2 * dense + 1e-7:
        raise SystemExit(f"wrong result: relative error {ours:.2e}, dense {dense:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3.2-1b", "llama-2-7b"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--sparsity", nargs="+", type=float, default=[0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99]
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()

    rows = []
    print(
        "shape         dtype     sparsity  dense ms  skipping ms  speed-up    p10 -   p90  of limit   GB/s"
    )
    for shape in options.shapes:
        hidden, neurons = SHAPES[shape]
        for name in options.dtypes:
            dtype = getattr(torch, name)
            layers = build(hidden, neurons, dtype, options.device)
            downs = [triton_ops.neuron_major_(layer.down.clone()) for layer in layers]
            for sparsity in options.sparsity:
                for layer in layers:
                    set_sparsity(layer, sparsity)
                with torch.no_grad(), triton_ops.backend(options.backend):
                    check(layers[0], downs[0])
                    seconds = by_turns(
                        {
                            "dense": lambda layers=layers: [layer.dense() for layer in layers],
                            "skipping": lambda layers=layers, downs=downs: [
                                layer.skipping(down) for layer, down in zip(layers, downs, strict=True)
                            ],
                        },
                        rounds=options.rounds,
                    )
                dense, ours = (spread([1e3 * s / len(layers) for s in v]) for v in seconds.values())
                ratio = speedup(*seconds.values())
                share = ratio["median"] / (3 / (1 + 2 * (1 - sparsity)))
                bandwidth = 3 * hidden * neurons * dtype.itemsize / dense["median"] / 1e6
                print(
                    f"{shape:13} {name:9} {sparsity:8.0%} {dense['median']:9.3f} {ours['median']:12.3f} "
                    f"{ratio['median']:8.2f}x {ratio['p10']:7.2f} - {ratio['p90']:5.2f} {share:9.0%} "
                    f"{bandwidth:11.1f}",
                    flush=True,
                )
                rows.append(
                    {
                        "shape": shape,
                        "hidden": hidden,
                        "neurons": neurons,
                        "dtype": name,
                        "batch": 1,
                        "sparsity": sparsity,
                        "layers": len(layers),
                        "dense_ms": dense,
                        "skipping_ms": ours,
                        "speedup": ratio,
                        "backend": options.backend,
                        "device": options.device,
                    }
                )
    save("mlp_decode", rows, options.json)


if __name__ == "__main__":
    main()
