"""L1 on the activations that reach the down projections, in the three normalisations that were published."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hf_sparse.forwards import Forwards, patched_or_all

Normalisation = Literal["prosparse", "sakana_paper", "sakana_code"]
"""What a coefficient is a coefficient of; see :class:`L1Penalty`."""


class L1Penalty:
    """Collects the L1 norm of what reaches the down projections in each forward of a model.

    ``h [..., F]`` is the input of a block's down projection: ``act(x gate) * (x up)`` of a gated block,
    ``act(x up)`` of a plain one. Of L blocks with F neurons each, in float32; of a model that is patched in
    part those are its patched blocks:

    ==================  ====================================================  ===========================
    ``"prosparse"``     sum over blocks of the mean over tokens and neurons   as arXiv 2402.13516 is read
    ``"sakana_paper"``  mean over blocks, tokens and neurons                  1 / L of it, arXiv 2603.23198
    ``"sakana_code"``   mean over blocks and tokens of the sum over neurons   F / L of it, released code
    ==================  ====================================================  ===========================

    A coefficient c of ``"prosparse"`` is ``c * L`` of ``"sakana_paper"`` and ``c * L / F`` of
    ``"sakana_code"``. Padding counts nowhere, see :class:`~hf_sparse.forwards.Forwards`; a token of stacked
    experts counts for each expert that it goes to.

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

    def __init__(self, model: nn.Module, normalisation: Normalisation = "prosparse") -> None:
        self._normalisation = normalisation
        self._terms: list[Tensor] = []
        begin, only = self._terms.clear, patched_or_all(model)
        self._forwards = Forwards(model, "h", self._collect, begin=begin, only=only)

    def value(self) -> Tensor:
        """The penalty of the last forward: a float32 scalar with gradient.

        Raises:
            RuntimeError: there was no forward, or its activations carry no gradient though one is wanted.

        """
        if not self._terms:
            raise RuntimeError("no forward of the model has run since this penalty was attached.")
        if torch.is_grad_enabled() and not any(term.requires_grad for term in self._terms):
            raise RuntimeError(
                "the activations of the last forward carry no gradient, so the L1 penalty would do nothing. "
                "With gradient checkpointing use activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        device = self._terms[0].device
        terms = torch.stack([term.to(device) for term in self._terms])
        return terms.sum() if self._normalisation == "prosparse" else terms.mean()

    def remove(self) -> None:
        """Take the hooks off the model and drop what was collected."""
        self._forwards.remove()
        self._terms.clear()

    def __enter__(self) -> L1Penalty:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _collect(self, _: int, h: Tensor, text: Tensor | None) -> None:
        # vector_norm accumulates in float32 and saves only h itself for backward, unlike h.float().abs().
        # A recomputation must save the same tensors as the forward did, so this runs there, too.
        neurons = 1 if self._normalisation == "sakana_code" else h.shape[-1]
        if text is None:
            tokens = h.numel() // h.shape[-1]
            mean = torch.linalg.vector_norm(h, 1, dtype=torch.float32) / (tokens * neurons)
        else:
            norms = torch.linalg.vector_norm(h, 1, dim=-1, dtype=torch.float32).flatten()
            mean = (norms * text).sum() / (text.sum().clamp(min=1) * neurons)
        if self._forwards.running:
            self._terms.append(mean)
