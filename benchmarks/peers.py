"""Greedy decoding of one sequence on a CPU, against llama.cpp with the very same weights.

    pip install llama-cpp-python gguf torchao
    python benchmarks/peers.py                 # the shape of Llama-3.2-1B, random weights
    python benchmarks/peers.py --model DIR     # a Llama that transformers can load

Competitors, by turns in one run: llama.cpp on a GGUF file of the stock model, in its dtype and as Q8_0; stock
transformers; the model patched (FATReLU, thresholds that silence the wanted share of every layer's neurons on
random tokens), as it comes and prepared, with and without certificates, of MLPs alone and of the output layer
as well, and with linear layers in int8 (``Int8WeightOnlyConfig`` of torchao). What a step costs depends on
shapes and sparsity, not on what weights say.

All start from one token, so that every step is one of decoding. "GB/s" is what must be read for a token over
the time of a step: all matrices, of the patched model the up and down projections of active neurons alone (a
certificate spares it most of the gate, which is not counted). "of a read" is that against a streaming read of
a large buffer that takes turns with all.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate
import harness
import numpy as np
import torch
from torch import Tensor

import hf_sparse

PEER = "llama.cpp"
INT8 = "prepared, int8"


class Peer:
    """A GGUF file in llama.cpp, decoding greedily."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            raise SystemExit(f"llama.cpp cannot load {path}.")
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def decode(self, first: int, count: int) -> list[int]:
        """``count`` tokens after ``first``."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        tokens = [first]
        for _ in range(count):
            batch = lib.llama_batch_get_one((ctypes.c_int32 * 1)(tokens[-1]), 1)
            if lib.llama_decode(self._context, batch):
                raise SystemExit("llama.cpp failed to decode.")
            logits = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (self._words,))
            tokens.append(int(logits.argmax()))
        return tokens[1:]


def quantised(path: Path) -> Path:
    """The same file as Q8_0, by llama.cpp itself."""
    import llama_cpp

    out = path.with_name(f"q8_{path.name}")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    if llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(settings)):
        raise SystemExit("llama.cpp failed to quantise.")
    return out


def step_bytes(model: Any, sparsity: float, itemsize: int) -> int:
    """Of the weights that one token needs, where this share of neurons is silent."""
    total = model.lm_head.weight.numel()
    for layer in model.model.layers:
        for name, weight in layer.named_parameters():
            if weight.ndim == 2:
                share = 1 - sparsity if "up_proj" in name or "down_proj" in name else 1.0
                total += int(weight.numel() * share)
    return total * itemsize


def check_int8(model: Any, tokens: Tensor, allowed: float) -> float:
    """The error of the logits by the kernels against torchao's own products, in standard deviations.

    Raises:
        SystemExit: it is larger than ``allowed``.

    """
    theirs, ours = (generate.logits(model, tokens[:, :9], 1, backend) for backend in ("dense", "auto"))
    error = ((ours - theirs).square().mean().sqrt() / theirs.std()).item()
    if not error <= allowed:
        raise SystemExit(f"wrong result, no timing: int8 logits off by {error}, more than {allowed}")
    return error


def silence() -> Any:
    """No log of llama.cpp while what is returned lives."""
    import llama_cpp

    nothing = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(nothing, ctypes.c_void_p(0))
    return nothing


def main() -> None:
    parser = harness.parser(__doc__, repeats=7)
    generate.add_model(parser)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="one competitor more: a compiled step")
    parser.add_argument("--int8", action=argparse.BooleanOptionalAction, default=True, help="by torchao")
    args = parser.parse_args()
    args.batch, args.static_cache, args.device = 1, False, "cpu"
    conditions = harness.begin_reading(args)
    nothing = silence()
    stock = generate.model_of(args)
    with tempfile.TemporaryDirectory() as folder:
        path = hf_sparse.export(stock, Path(folder) / "model.gguf", format="gguf")
        sizes = {f"{PEER}, {args.dtype}": path, f"{PEER}, Q8_0": quantised(path)}
        peers = {name: Peer(one, torch.get_num_threads(), args.new_tokens + 8) for name, one in sizes.items()}
        files = {name: one.stat().st_size for name, one in sizes.items()}
    rows = compare(stock, peers, files, args)
    print(harness.table([cells(row) for row in rows]))
    harness.save(args.out, conditions | {"llama_cpp": harness.version("llama_cpp_python")}, rows)
    print("written to", args.out)
    del nothing


def compare(
    stock: Any, peers: dict[str, Peer], files: dict[str, int], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each competitor."""
    tokens = torch.randint(1, stock.config.vocab_size, (1, 256))
    first = tokens[:, :1]
    found = variants(stock, tokens, args)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda peer=peer: torch.tensor([peer.decode(int(first), args.new_tokens)])
        for name, peer in peers.items()
    }
    for name, model in found.items():
        decode = generate.generation(model, first, "dense" if name == "stock" else "auto", args)
        calls[name] = lambda decode=decode: decode()[:, 1:]
    runs = {name: harness.Run([call], "cpu", graph=False) for name, call in calls.items()}
    given = {name: run.outputs()[0] for name, run in runs.items()}
    seen = torch.cat([first, given["patched"]], 1)
    silent = generate.silent_share(found["patched"], seen, 1)
    sparse = {name: model for name, model in found.items() if name != "stock" and INT8 not in name}
    errors = generate.check_logits(found["patched"], sparse, seen, 1, "auto")
    for name in found:
        if INT8 in name:
            errors[name] = check_int8(found[name], seen, 4 * errors["patched, dense"] + 1e-4)
    times, _ = harness.interleaved(runs | {"read": args.read.run}, args.repeats)
    limit = args.read.speed(times["read"])
    rival = times[f"{PEER}, {args.dtype}"].median_ms
    rows = []
    for name in runs:
        shares = silent if name in sparse or INT8 in name else 0.0
        itemsize = 1 if INT8 in name else stock.dtype.itemsize
        size = files[name] if name in files else step_bytes(stock, shares, itemsize)
        speed = size * args.new_tokens / times[name].median_ms / 1e6
        same = (given[name] == given["stock"]).int().cumprod(1).sum().item()
        rows.append(
            {
                "model": name,
                "of": "random" if args.model is None else args.model.name,
                "hidden": stock.config.hidden_size,
                "neurons": stock.config.intermediate_size,
                "layers": stock.config.num_hidden_layers,
                "vocab": stock.config.vocab_size,
                "dtype": "Q8_0" if "Q8_0" in name else "int8" if INT8 in name else args.dtype,
                "sparsity": round(shares, 4),
                "new_tokens": args.new_tokens,
                "decode": times[name],
                "tokens_per_s": round(args.new_tokens / times[name].median_ms * 1e3, 2),
                "to_llama_cpp": round(rival / times[name].median_ms, 3),
                "to_stock": round(times["stock"].median_ms / times[name].median_ms, 3),
                "gb_per_s": round(speed, 2),
                "read_gb_per_s": limit,
                "bandwidth_share": round(speed / limit, 3),
                "tokens_as_stock": same if shares == 0.0 else None,
                "logit_error": errors.get(name),
            }
        )
    return rows


def variants(stock: Any, tokens: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The forms of the model in transformers, which share the weights that none of them changes."""
    threshold = generate.thresholds(stock, tokens, args.sparsity)
    found = {"stock": stock}
    forms: dict[str, dict[str, bool]] = {
        "patched": {"linears": False},
        "prepared": {},
        "prepared, certified": {"certify": True},
        "prepared, output certified, too": {"certify": True, "greedy_output": True},
    }
    if args.compile:
        forms["prepared, compiled"] = {"compile": True}
        forms["prepared, compiled, all certified"] = {"compile": True, "certify": True, "greedy_output": True}
    if args.int8:
        forms[INT8] = {}
    if args.int8 and args.compile:
        forms[f"{INT8}, compiled"] = {"compile": True}
    for name, prepared in forms.items():
        found[name] = copied(stock)
        if INT8 in name:
            quantise(found[name])
        hf_sparse.patch(found[name], "fatrelu", threshold=threshold)
        hf_sparse.prepare(found[name], **prepared)
    return found


def copied(model: Any) -> Any:
    """A copy whose gate and down projections are its own: for certificates, and for another layout."""
    # A memo of parameters makes deepcopy share them.
    own = ("gate_proj", "down_proj")
    shared = {id(p): p for name, p in model.named_parameters() if not any(one in name for one in own)}
    return copy.deepcopy(model, shared)


def quantise(model: Any) -> None:
    """All linear layers to int8, by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        "sparsity": f"{row['sparsity']:.1%}",
        "tokens/s": f"{row['tokens_per_s']:.2f}",
        "to llama.cpp": f"{row['to_llama_cpp']:.2f}x",
        "to stock": f"{row['to_stock']:.2f}x",
        "GB/s": f"{row['gb_per_s']:.1f}",
        "of a read": f"{row['bandwidth_share']:.0%}",
        "tokens as stock": "" if row["tokens_as_stock"] is None else str(row["tokens_as_stock"]),
    }


if __name__ == "__main__":
    main()
