"""measure: activation sparsity and perplexity of a model on text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.adapters import Block
from hf_sparse.composite import inner_models
from hf_sparse.metrics.metric import Metric, MetricReport
from hf_sparse.metrics.report import LayerSparsity, SparsityReport
from hf_sparse.observing import BlockObserver, Observer, blocks_of, observe
from hf_sparse.observing.running import inner_model, without_copies


def measure(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = False,
    metrics: Iterable[str] = (),
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
            it is 0 there is padding, which counts nowhere), ``labels`` ``[B, S]`` (-100 is left out of
            the loss) and ``position_ids`` ``[B, S]`` (where they begin anew, as packed documents do,
            nothing is predicted from what comes before). An encoder-decoder needs labels ``[B, T]``, what its
            decoder is to give (-100 is padding, if there is no ``decoder_attention_mask``); they are not
            shifted, and blocks of the encoder count its tokens, those of the decoder theirs.
        tokenizer: for texts; None loads the one of ``model.name_or_path``.
        sequence_length: tokens per window of text. Texts are joined by end-of-text tokens and cut. None means
            the model's context, at most 1,024.
        batch_size: windows per forward.
        max_tokens: stop after this many tokens (batches are not cut: after the batch that reaches it).
        progress: show a progress bar.
        metrics: names of what else to count in the same pass, for ``report.metrics``: such as ``"density"``,
            by token and by neuron, or ``"union"``, over several tokens. docs/measuring.md has them all.

    Raises:
        PatchError: no MLP block of a known shape in ``model``; or a metric cannot be had of one of them.
        ValueError: no data, or data of another kind, such as texts for an encoder-decoder; no tokenizer; a
            size out of range; a model that predicts no tokens; a metric that is not known.

    """
    return measure_beside(
        (),
        model,
        data,
        metrics=metrics,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        progress=progress,
    )


def measure_beside(
    observers: Sequence[BlockObserver],
    model: nn.Module,
    data: Iterable[Any],
    *,
    metrics: Iterable[str] = (),
    **options: Any,
) -> SparsityReport:
    """As :func:`measure`, with ``observers`` that look on in the same pass."""
    blocks = blocks_of(model)
    counters = [ZeroCounter(block) for block in blocks]
    others = {one: [one(block) for block in blocks] for one in _chosen(metrics)}
    passed = observe(model, data, [*counters, *chain(*others.values()), *observers], **options)
    layers = [counter.result() for counter in counters]
    if not any(layer.tokens for layer in layers):
        raise ValueError(
            f"the model ran, but no token reached the down projection of any of its {len(layers)} MLP "
            "blocks: something runs them by other means than their modules."
        )
    if inner_models(inner_model(without_copies(model))):  # parts that see no text, such as one for images
        seen = [bool(layer.tokens) for layer in layers]
        layers = list(compress(layers, seen))
        others = {one: list(compress(counted, seen)) for one, counted in others.items()}
    return SparsityReport(
        layers=tuple(layers),
        loss=passed.loss,
        tokens=passed.tokens,
        predicted_tokens=passed.predicted_tokens,
        sequence_length=passed.sequence_length,
        metrics={
            one.name: MetricReport(one.name, one.about, tuple(block.result() for block in counted))
            for one, counted in others.items()
        },
    )


def _chosen(names: Iterable[str]) -> list[type[Metric]]:
    if not names:
        return []
    from hf_sparse.metrics.registry import chosen  # which imports every metric

    return chosen(names)


class ZeroCounter(Observer):
    """Counts the exact zeros in what reaches one block's down projection."""

    site = "h"

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._nonzeros: Tensor | None = None
        """int64 [F]: tokens for which each neuron is not zero."""
        self._of_experts = False
        self._tokens = self._values = 0
        self._neurons = block.intermediate_size

    def update(self, values: Tensor, routed: bool) -> None:
        # count_nonzero takes NaN for a value, as it should be: NaN is not silence.
        nonzeros_F = torch.count_nonzero(values, dim=0)
        self._nonzeros = nonzeros_F if self._nonzeros is None else self._nonzeros + nonzeros_F
        self._of_experts |= routed
        self._tokens += len(values)
        self._values += values.numel()

    def result(self) -> LayerSparsity:
        layer = LayerSparsity(name=self.block.name, neurons=self._neurons, tokens=self._tokens, zeros=0)
        if self._nonzeros is None:
            return layer
        layer = replace(layer, zeros=self._values - int(self._nonzeros.sum()))
        if self._of_experts or len(self._nonzeros) != self._neurons:
            return layer
        bits = "".join("1" if active else "0" for active in (self._nonzeros > 0).flip(0).tolist())
        active = int(bits, 2)
        return replace(layer, dead=self._neurons - active.bit_count(), active=active)
