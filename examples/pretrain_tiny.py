"""Pretrain the embedded model: a Llama of about 1.4 M parameters on the running Python's own documentation.

    python examples/pretrain_tiny.py --output hf_sparse/assets/pydoc-llama

Text (``hf_sparse.assets.corpus``), tokenizer, model, training loop and model card, in the order of the story.
Seeded: one machine, one torch and one thread count give one model. About 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_sparse.assets.corpus import Corpus, python_corpus

END = "<|endoftext|>"
PROMPTS = ("Return the", "The list of", "This module provides")


def train_tokenizer(documents: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text has tokens, no unknown ones) with one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def tokens_of(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents as one int64 vector, each opened by the end-of-text token."""
    texts = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for text in texts for token in [tokenizer.eos_token_id, *text]])


def make_model(vocabulary: int, context: int) -> LlamaForCausalLM:
    """A Llama in miniature whose MLPs hold most of the weights, as they do in the large ones."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def batches(tokens: torch.Tensor, batch: int, context: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` batches ``[batch, context]``; each pass over the text has its own offset and order."""
    generator = torch.Generator().manual_seed(seed)
    windows: list[torch.Tensor] = []
    for _ in range(steps):
        while len(windows) < batch:
            start = int(torch.randint(context, (), generator=generator))
            count = (len(tokens) - start) // context
            cut = tokens[start : start + count * context].view(count, context)
            windows += list(cut[torch.randperm(count, generator=generator)])
        yield torch.stack([windows.pop() for _ in range(batch)])


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> None:
    """AdamW with weight decay on matrices only, clipped to a gradient norm of 1."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    stream = batches(tokens, args.batch_size, args.context, args.steps, args.seed)
    progress = tqdm(stream, total=args.steps, mininterval=5)
    for step, input_ids in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step == args.steps - 1:
            held = held_out_loss(model, held_out, args.context)
            progress.write(f"step {step + 1:5d}  train {loss.item():.3f}  held-out {held:.3f}")


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, context: int) -> float:
    """Mean cross-entropy in nats per token, over windows of ``context`` tokens."""
    model.eval()
    count = len(tokens) // context
    total = 0.0
    for input_ids in tokens[: count * context].view(count, context).split(16):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (count * (context - 1))


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Entropy, in nats per token, of the tokens' own frequencies: what a model that knows no order pays."""
    shares = torch.bincount(tokens).double() / len(tokens)
    return torch.special.entr(shares).sum().item()


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Forty greedy tokens after the prompt."""
    inputs = tokenizer(END + prompt, return_tensors="pt", return_token_type_ids=False)
    model.eval()
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, output: Path) -> None:
    """Weights stored as float16 to halve the download; ``config.json`` says float32, which is what loads."""
    if output.exists():
        shutil.rmtree(output)
    model.half().save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    config["dtype"] = "float32"
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(output)
    # The name that transformers 4 knows too; version 5 writes another one for the same class.
    tokenizer_config = (output / "tokenizer_config.json").read_text()
    tokenizer_config = tokenizer_config.replace("TokenizersBackend", "PreTrainedTokenizerFast")
    (output / "tokenizer_config.json").write_text(tokenizer_config)
    (output / "README.md").write_text(card)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
language: en
license: psf-2.0
---
# pydoc-llama

A Llama (SwiGLU, grouped-query attention, tied embeddings) of {parameters:,} parameters, pretrained by
`examples/pretrain_tiny.py` on the help topics and docstrings of Python {python}. It exists so that
`hf-sparse quickstart` and the tests have a real pretrained model without a download. It is of no other
use: it writes in the manner of Python's manual, and what it writes is not true.

| | |
|---|---|
| training text | {train_tokens:,} tokens in {train_documents} documents |
| held-out text | {held_out_tokens:,} tokens in {held_out_documents} documents |
| trained on | {steps:,} steps of {batch} x {context} tokens ({seen:.1f} M tokens), seed {seed} |
| held-out loss | **{loss:.3f}** nats per token (perplexity {perplexity:.1f}) |
| unigram entropy of these tokens | {entropy:.3f} nats per token (perplexity {entropy_perplexity:.1f}) |

Held-out documents share no paragraph with the training text. Weights are stored in float16 and load as
float32, which `config.json` asks for; the numbers above are of the stored weights.

Greedy text, the prompt in bold:

{samples}

Text and therefore model derive from the Python documentation and library, © Python Software Foundation, under
the PSF License Version 2.
"""


def model_card(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, **facts: object
) -> str:
    """The README of the model folder, with what was measured."""
    samples = []
    for prompt in PROMPTS:
        text = greedy(model, tokenizer, prompt).removeprefix(prompt)
        samples.append(f"> **{prompt}**" + text.replace("\n", "\n> "))
    return CARD.format(
        parameters=model.num_parameters(),
        python=".".join(platform.python_version_tuple()[:2]),
        train_documents=len(corpus.train),
        held_out_documents=len(corpus.held_out),
        samples="\n\n".join(samples),
        **facts,
    )


def main() -> None:
    """Make the model folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="model folder; replaced if there")
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    corpus = python_corpus()
    tokenizer = train_tokenizer(list(corpus.train), args.vocabulary, args.context)
    tokens, held_out = tokens_of(list(corpus.train), tokenizer), tokens_of(list(corpus.held_out), tokenizer)
    model = make_model(args.vocabulary, args.context)
    entropy = unigram_entropy(held_out)
    print(f"{model.num_parameters():,} parameters")
    print(f"{len(tokens):,} training and {len(held_out):,} held-out tokens")
    print(f"unigram entropy of the held-out tokens: {entropy:.3f} nats per token")

    started = time.perf_counter()
    train(model, tokens, held_out, args)
    seen = args.steps * args.batch_size * args.context
    print(f"{seen / (time.perf_counter() - started):,.0f} tokens/s")

    model.half().float()  # measure the very weights that are stored
    loss = held_out_loss(model, held_out, args.context)
    card = model_card(
        model,
        tokenizer,
        corpus,
        train_tokens=len(tokens),
        held_out_tokens=len(held_out),
        steps=args.steps,
        batch=args.batch_size,
        context=args.context,
        seen=seen / 1e6,
        seed=args.seed,
        loss=loss,
        perplexity=math.exp(loss),
        entropy=entropy,
        entropy_perplexity=math.exp(entropy),
    )
    save(model, tokenizer, card, args.output)
    print(card)


if __name__ == "__main__":
    main()
