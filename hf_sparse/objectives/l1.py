"""L1 on the activations that reach the down projections: what ProSparse adds to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.adapters import require_blocks


class L1Penalty:
    """Collects ``sum over MLP blocks of mean |h|`` in each forward of a model.

    ``h [..., F]`` is the input of a block's down projection: ``act(x gate) * (x up)`` of a gated block,
    ``act(x up)`` of a plain one. The mean is over tokens **and** neurons, in float32, and the means of the
    blocks are summed. Coefficients from elsewhere may mean another normalisation: without the mean over
    neurons they are F times smaller; with a mean over the L blocks they are L times larger.

    Use::

        with L1Penalty(model) as l1:
            loss = model(input_ids, labels=input_ids).loss + coefficient * l1.value()
            loss.backward()

    Give it the bare model, before or after wrapping it for data parallelism. It is correct under
    (non-reentrant) gradient checkpointing: what a recomputation passes through the hooks again is not
    counted. It costs no activation memory, since h is kept for the down projection anyway. Attach it when the
    PEFT adapter to be trained is active: of ``modules_to_save`` it watches the copy in use.

    Raises:
        PatchError: no MLP block of a known shape is found in ``model``.

    """

    def __init__(self, model: nn.Module) -> None:
        blocks, _ = require_blocks(model)
        self._means: list[Tensor] = []
        self._in_forward = False
        # The two hooks on the whole model mark where a forward begins and ends, which tells it from a
        # recomputation: that reruns the layers during backward, without the model around them.
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
            *(block.watch("h", self._collect) for block in blocks),
        ]

    def value(self) -> Tensor:
        """The penalty of the last forward: a float32 scalar with gradient.

        Raises:
            RuntimeError: there was no forward, or its activations carry no gradient though one is wanted.

        """
        if not self._means:
            raise RuntimeError("no forward of the model has run since this penalty was attached.")
        if torch.is_grad_enabled() and not any(mean.requires_grad for mean in self._means):
            raise RuntimeError(
                "the activations of the last forward carry no gradient, so the L1 penalty would do nothing. "
                "With gradient checkpointing use activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        device = self._means[0].device
        return torch.stack([mean.to(device) for mean in self._means]).sum()

    def remove(self) -> None:
        """Take the hooks off the model and drop what was collected."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._means = []

    def __enter__(self) -> L1Penalty:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._means = []
        self._in_forward = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_forward = False

    def _collect(self, h: Tensor, _: Tensor | None) -> None:
        # vector_norm accumulates in float32 and saves only h itself for backward, unlike h.float().abs().
        # A recomputation must save the same tensors as the forward did, so this runs there, too.
        mean = torch.linalg.vector_norm(h, 1, dtype=torch.float32) / h.numel()
        if self._in_forward:
            self._means.append(mean)
