"""What a patch costs before the first token: loading a patched checkpoint, and patching a large model.

    python benchmarks/loading.py --model DIR        # a folder that transformers can load
    python benchmarks/loading.py                    # a Llama of the shape of SmolLM2-135M, random weights

The checkpoint is saved twice, as it is and patched (FATReLU, so that loading cannot do without this package).
Each is loaded by new processes that take turns, all of which import the same packages first. Beside the time
that passes there is that of the processor, of all threads: what else is running is in it less. Memory is the
peak of what the process had in RAM. Patching is timed on the meta device, at the shape of Llama-3-8B.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_sparse

LOAD = """
import json, resource, sys, time
import hf_sparse
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_config  # imported before the clock runs
from transformers.models.llama import modeling_llama
start = time.perf_counter(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
seconds, busy = time.perf_counter() - start[0], time.process_time() - start[1]
for parameter in model.parameters():
    parameter.sum()  # what is mapped from the file is read
kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
patched = hf_sparse.inspect(model).config is not None
print(json.dumps({"seconds": seconds, "busy": busy, "mib": kib / 1024, "patched": patched}))
"""


def main() -> None:
    parser = harness.parser(__doc__, repeats=9)
    parser.add_argument("--model", type=Path, help="folder of a model; default: random weights")
    args = parser.parse_args()
    conditions = harness.begin(args)
    rows = [patching(args)]
    with tempfile.TemporaryDirectory() as folder:
        rows += loading(save(args, Path(folder)), args)
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items()))
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def patching(args: argparse.Namespace) -> dict[str, Any]:
    """Of a model without weights."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    seconds = []
    for _ in range(args.repeats + 1):
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        start = time.perf_counter()
        hf_sparse.patch(model, "fatrelu", threshold=0.1)
        seconds.append(time.perf_counter() - start)
        hf_sparse.unpatch(model)
    return {
        "what": "patch",
        "shape": "llama-3-8b",
        "first": seconds[0],
        "time": harness.Timing.of(seconds[1:]),
    }


def save(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The checkpoint as it is and patched."""
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        model = LlamaForCausalLM(harness.smollm2())
    found = {"dense": folder / "dense", "patched": folder / "patched"}
    model.save_pretrained(found["dense"])
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    model.save_pretrained(found["patched"])
    if args.model and (args.model / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        for path in found.values():
            tokenizer.save_pretrained(path)
    return found


def loading(folders: dict[str, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    seconds, busy, mib = ({name: list[float]() for name in folders} for _ in range(3))
    for repeat in range(args.repeats + 1):
        for name, folder in folders.items():
            command = [sys.executable, "-c", LOAD, str(folder)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if found["patched"] != (name == "patched"):
                raise SystemExit(f"wrong result, no timing: {name} was loaded as {found}")
            if repeat:
                seconds[name].append(found["seconds"])
                busy[name].append(found["busy"])
                mib[name].append(found["mib"])
    weights = "random, of the shape of SmolLM2-135M" if args.model is None else args.model.name
    return [
        {
            "what": "load",
            "checkpoint": name,
            "model": weights,
            "time": harness.Timing.of(seconds[name]),
            "slower": harness.Ratio.of(seconds[name], seconds["dense"]),
            "processor_time": harness.Timing.of(busy[name]),
            "more_processor_time": harness.Ratio.of(busy[name], busy["dense"]),
            "peak_mib": sorted(mib[name])[len(mib[name]) // 2],
            "more_memory": harness.Ratio.of(mib[name], mib["dense"]),
        }
        for name in folders
    ]


if __name__ == "__main__":
    main()
