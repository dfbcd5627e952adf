"""measure: activation sparsity and perplexity of a model on text."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_sparse.adapters import Block, require_blocks
from hf_sparse.composite import inner_models
from hf_sparse.metrics.batches import as_batches, parts
from hf_sparse.metrics.encoder_decoder import in_encoder, seen, summed_loss
from hf_sparse.metrics.report import LayerSparsity, SparsityReport
from hf_sparse.metrics.running import inner_model, input_device, observed, without_copies


def measure(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = False,
) -> SparsityReport:
    """Run ``model`` over ``data``; report per-layer and overall activation sparsity, loss and perplexity.

    Sparsity is the share of exact zeros among the values that reach the down projections of the MLP blocks,
    over tokens, neurons and layers. A dense (SiLU, GELU) model has none. Works on stock, patched and
    PEFT-wrapped models, also offloaded, compiled, sharded or replicated ones, and leaves the model as it was:
    mode, hooks, weights, and free to be trained on.

    Args:
        model: a causal language model of transformers, or an encoder-decoder, which takes batches alone.
        data: texts; or rows with a ``"text"``, as ``datasets`` gives them (nulls among either are left out);
            or batches, as of a DataLoader:
            mappings with ``input_ids`` int64 ``[B, S]`` and optionally ``attention_mask`` ``[B, S]`` (where
            it is 0 there is padding, which counts nowhere) and ``labels`` ``[B, S]`` (-100 is left out of
            the loss). An encoder-decoder needs labels ``[B, T]``, what its decoder is to give (-100 is
            padding, if there is no ``decoder_attention_mask``); they are not shifted, and blocks of the
            encoder count its tokens, those of the decoder theirs.
        tokenizer: for texts; None loads the one of ``model.name_or_path``.
        sequence_length: tokens per window of text. Texts are joined by end-of-text tokens and cut. None means
            the model's context, at most 1,024.
        batch_size: windows per forward.
        max_tokens: stop after this many tokens (batches are not cut: after the batch that reaches it).
        progress: show a progress bar.

    Raises:
        PatchError: no MLP block of a known shape in ``model``.
        ValueError: no data, or data of another kind, such as texts for an encoder-decoder; no tokenizer; a
            size out of range; a model that predicts no tokens.

    """
    _require_positive(sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens)
    model = without_copies(model)
    blocks, _ = require_blocks(model)
    bare = inner_model(model)
    batches, window = as_batches(
        bare,
        data,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    counters = [ZeroCounter(block) for block in blocks]
    of_encoder = in_encoder(bare, blocks) if getattr(bare.config, "is_encoder_decoder", False) else None
    loss = 0.0
    tokens = predicted = 0
    takes_positions = "position_ids" in signature(bare.forward).parameters
    device = input_device(bare)
    with ExitStack() as stack:
        stack.enter_context(observed(model))
        for counter in counters:
            stack.enter_context(counter)
        bar = stack.enter_context(_bar(max_tokens, progress))
        for batch in batches:
            if of_encoder is not None:
                given = seen(bare, batch, device)
                for counter, inside in zip(counters, of_encoder, strict=True):
                    counter.mask = given.encoder_mask if inside else given.decoder_mask
                output = model(**given.inputs, use_cache=False)
                total, count = summed_loss(output, given.inputs["labels"])
                size = sum(int(mask.count_nonzero()) for mask in given[1:])
            else:
                input_ids, mask, labels = parts(batch, device)
                padding = mask is not None and not mask.all()
                for counter in counters:
                    counter.mask = mask if padding else None
                extra: dict[str, Tensor] = {}
                if mask is not None and not mask[:, 0].all() and takes_positions:
                    extra["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)  # padded on the left
                output = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra)
                total, count = _loss(output, input_ids, mask, labels)
                size = input_ids.numel() if mask is None else int(mask.count_nonzero())
            loss += total
            predicted += count
            tokens += size
            bar.update(size)
            if max_tokens is not None and tokens >= max_tokens:
                break
    if not predicted:
        raise ValueError(
            "data holds no token to predict: it is empty, an iterator that was used up before, or all its "
            "texts are shorter than two tokens."
        )
    layers = tuple(counter.result() for counter in counters)
    if not any(layer.tokens for layer in layers):
        raise ValueError(
            f"the model ran, but no token reached the down projection of any of its {len(layers)} MLP "
            "blocks: something runs them by other means than their modules."
        )
    if inner_models(bare):  # parts that see no text, such as one for images
        layers = tuple(layer for layer in layers if layer.tokens)
    return SparsityReport(
        layers=layers,
        loss=loss / predicted,
        tokens=tokens,
        predicted_tokens=predicted,
        sequence_length=window,
    )


class ZeroCounter:
    """Counts, while entered, the exact zeros in what reaches one block's down projection."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._nonzeros: Tensor | None = None
        """int64 [F]: tokens for which each neuron is not zero."""
        self._of_experts = False
        self._tokens = self._values = 0
        self._neurons = block.intermediate_size
        self.mask: Tensor | None = None
        """Int ``[B, S]``, 0 at padding; None means there is none."""

    def __enter__(self) -> ZeroCounter:
        self._handle = self._block.watch("h", self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _count(self, h: Tensor, tokens: Tensor | None) -> None:
        h_TF = h.flatten(0, -2)
        if self.mask is not None:
            is_text = self.mask.flatten().to(h_TF.device).bool()
            if tokens is not None:
                is_text = is_text[tokens]
            if len(h_TF) != len(is_text):
                raise ValueError(
                    f"{self._block.name} received {len(h_TF)} tokens of a batch of {self.mask.numel()}, so "
                    "padding cannot be told from text there; give batches without padding."
                )
            h_TF = h_TF[is_text]
        # count_nonzero takes NaN for a value, as it should be: NaN is not silence.
        nonzeros_F = torch.count_nonzero(h_TF, dim=0)
        self._nonzeros = nonzeros_F if self._nonzeros is None else self._nonzeros + nonzeros_F
        self._of_experts |= tokens is not None  # a column is a neuron of each of them
        self._tokens += len(h_TF)
        self._values += h_TF.numel()

    def result(self) -> LayerSparsity:
        layer = LayerSparsity(name=self._block.name, neurons=self._neurons, tokens=self._tokens, zeros=0)
        if self._nonzeros is None:
            return layer
        layer = replace(layer, zeros=self._values - int(self._nonzeros.sum()))
        if self._of_experts or len(self._nonzeros) != self._neurons:
            return layer
        bits = "".join("1" if active else "0" for active in (self._nonzeros > 0).flip(0).tolist())
        active = int(bits, 2)
        return replace(layer, dead=self._neurons - active.bit_count(), active=active)


def _loss(output: Any, input_ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> tuple[float, int]:
    """Summed cross-entropy of the next tokens, in nats, and their number."""
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError("the model gives no logits; load it with AutoModelForCausalLM.")
    if logits.shape[:-1] != input_ids.shape:
        raise ValueError(
            f"the model gives logits {list(logits.shape)} for input_ids {list(input_ids.shape)}, where "
            "measure needs a row for each token: load it with AutoModelForCausalLM, and without prompt "
            "tuning, which adds tokens of its own."
        )
    targets = (input_ids if labels is None else labels).clone()
    if mask is not None:
        targets[mask == 0] = -100
        targets[:, 1:][mask[:, :-1] == 0] = -100  # what follows padding is not predicted from text
    targets = targets[:, 1:].to(logits.device)
    total = 0.0
    for row, target in zip(logits[:, :-1], targets, strict=True):  # one sequence at a time in float32
        total += cross_entropy(row.float(), target, reduction="sum", ignore_index=-100).item()
    return total, int((targets != -100).sum())


def _bar(max_tokens: int | None, progress: bool) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(total=max_tokens, desc="measure", unit=" tokens", unit_scale=True, disable=not progress)


def _require_positive(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} is out of range; use 1 or more.")
