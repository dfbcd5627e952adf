"""Sparsity in the evaluations of a trainer, from the forwards that it makes anyway."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from hf_sparse.adapters import require_blocks
from hf_sparse.errors import PatchError
from hf_sparse.metrics.report import LayerSparsity, SparsityReport
from hf_sparse.metrics.sparsity import ZeroCounter
from hf_sparse.observing.encoder_decoder import in_encoder, seen
from hf_sparse.observing.running import inner_model, input_device


class EvaluatedSparsity:
    """Counts exact zeros in every forward in evaluation mode; those of evaluations are kept.

    The observers are those of :func:`hf_sparse.measure`, and the forwards those of the trainer. Rather than
    wrong numbers there are none: of an encoder-decoder that is called without labels, or gives no text.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks, _ = require_blocks(model)
        self._inner = inner_model(model)
        self._of_encoder: list[bool] | None = None
        """Of each block; None of a model with one stack."""
        if getattr(self._inner.config, "is_encoder_decoder", False):
            try:
                self._of_encoder = in_encoder(self._inner, self._blocks)
            except PatchError:
                self._blocks = []
        self._counting = ExitStack()
        self._last: list[ZeroCounter] = []
        self._layers: list[LayerSparsity] = []
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._counting.close()
        for hook in self._hooks:
            hook.remove()

    def count(self) -> None:
        """Keep what the last forward gave: it was one of an evaluation."""
        if not self._last:
            return
        found = [counter.result() for counter in self._last]
        self._layers = [a + b for a, b in zip(self._layers, found, strict=True)] if self._layers else found
        self._last = []

    def report(self, loss: float) -> SparsityReport | None:
        """What was kept since the last report, of all processes, which have to ask together; None if nothing.

        ``predicted_tokens`` is the number of tokens: which of them ``loss`` is over is not known.
        """
        from accelerate.utils import gather_object

        everywhere = gather_object([self._layers])
        self._layers = []
        if not all(everywhere):
            return None
        layers = [sum(same[1:], start=same[0]) for same in zip(*everywhere, strict=True)]
        layers = [layer for layer in layers if layer.tokens]
        tokens = max((layer.tokens for layer in layers), default=0)
        if not tokens:
            return None
        return SparsityReport(layers=tuple(layers), loss=loss, tokens=tokens, predicted_tokens=tokens)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._counting.close()
        self._last = []
        if model.training or (self._of_encoder is not None and not self._inner.can_generate()):
            return
        counters = [ZeroCounter(block) for block in self._blocks]
        if self._of_encoder is None:
            mask = kwargs.get("attention_mask")
            for counter in counters:
                counter.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        else:
            try:
                given = seen(self._inner, kwargs, input_device(self._inner))
            except ValueError:
                return
            given.show(counters, self._of_encoder)
        for counter in counters:
            self._counting.enter_context(counter)
        self._last = counters

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._counting.close()
