"""The command ``hf-sparse generate``."""

from __future__ import annotations

import argparse
import sys
import time

from hf_sparse.cli.command import Command
from hf_sparse.cli.options import add_model, load
from triton_ops import AUTO, BACKENDS


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0, the default, is greedy; 1 samples as is",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling; default: 0")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=AUTO,
        help="auto, the default, skips neurons where that was measured to be faster; dense never skips",
    )
    parser.add_argument(
        "--certify",
        action="store_true",
        help="one byte more per gate weight proves which neurons are silent: the same text, less to read",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the continuation as it comes, and how long it took."""
    import torch
    from transformers import TextStreamer

    import hf_sparse

    for name, low in (("max_new_tokens", 1), ("temperature", 0)):
        if getattr(arguments, name) < low:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(arguments, name)} is below {low}.")
    model, tokenizer = load(arguments.model)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("--prompt has no tokens; give some text.")
    if arguments.certify:
        hf_sparse.prepare(model, certify=True)
    torch.manual_seed(arguments.seed)
    sampling = {"temperature": arguments.temperature} if arguments.temperature else {}
    begin = time.perf_counter()
    with hf_sparse.backend(arguments.backend):
        ids = model.generate(
            **inputs,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=bool(sampling),
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - begin
    count = ids.shape[1] - length
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


COMMAND = Command(
    text="Continue a prompt; a patched model skips its silent neurons.",
    example='hf-sparse generate ./llama-relu --prompt "The capital of France" --backend auto',
    add_options=add_options,
    run=run,
)
