"""explain: where the density of a model's MLP blocks comes from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_sparse.activations import StatisticalTopK, gives_zeros
from hf_sparse.activations.mixed import unmixed
from hf_sparse.activations.relu_family import JSReLU
from hf_sparse.adapters import Block, find_blocks
from hf_sparse.composite import inner_models
from hf_sparse.errors import PatchError
from hf_sparse.flatness.effective_gradient import EffectiveGradient
from hf_sparse.flatness.keys import Gain, KeyFlatness
from hf_sparse.flatness.layer import LayerFlatness
from hf_sparse.flatness.report import FlatnessReport, deviation
from hf_sparse.flatness.spectrum import LIMIT, spectra
from hf_sparse.flatness.values import ValueFlatness
from hf_sparse.norms import preceding_norms
from hf_sparse.observing import BlockObserver, blocks_of, observe
from hf_sparse.observing.running import inner_model, without_copies

_TOLERANCE = 0.02
"""Of the identity. Rounding of bfloat16 gradients is a tenth of it."""


def explain(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = False,
    spectrum_limit: int = LIMIT,
) -> FlatnessReport:
    """Account for the density of every MLP block by the ratio of arXiv 2605.25612.

    ``density = AF_K / (T n C)``: the share of neurons with ``σ'(p) ≠ 0``, which under ReLU are those that are
    not silent, is the augmented flatness of the key matrix over T tokens, n neurons and C, the mean of
    ``g² σ'² |x|²`` over these neurons. That is an identity, at whatever weights. What follows from it about
    training is a conjecture; the report says so where it has numbers for it.

    It goes forward and back through the model, which needs the memory of training without that of weights'
    gradients and optimizer: less with a smaller ``batch_size`` or ``sequence_length``. The model is left as
    it was, and parameters get no gradients.

    The theory is of plain blocks, ``V σ(K x)``. In a gated block K is the gate projection, and the identity
    holds with ``g = u ⊙ ∂L/∂h``; see :class:`~hf_sparse.flatness.KeyFlatness`. Dense models (SiLU, GELU) have
    a density of 1; of them the report says how much of AF_K the neurons with ``p > 0`` have.

    Args:
        model: as :func:`hf_sparse.measure` takes it, stock or patched.
        data: as there. Padding counts nowhere; labels of -100 are left out of the loss.
        tokenizer: as there.
        sequence_length: as there.
        batch_size: windows per forward.
        max_tokens: as there.
        progress: show a progress bar.
        spectrum_limit: the shorter side of the largest weight matrix whose singular values are computed; 0
            computes none. They take long: see :data:`hf_sparse.flatness.spectrum.LIMIT`.

    Raises:
        PatchError: no MLP block of a known shape; one of experts; one whose activation is not elementwise or
            does not get what the key matrix gives; one whose output the loss does not depend on; one with an
            adapter on a layer with a threshold.
        ValueError: as :func:`hf_sparse.measure`; or the pre-activation of a stock block cannot be watched,
            which patching it with ``"original"`` mends.

    """
    if spectrum_limit < 0:
        raise ValueError(f"spectrum_limit={spectrum_limit} is out of range; use 0 or more.")
    blocks = blocks_of(model)
    for block in blocks:
        _require_elementwise(block)
    gains = _gains(inner_model(without_copies(model)))
    looks = [
        (KeyFlatness(one, gains.get(id(one.module))), ValueFlatness(one), EffectiveGradient(one))
        for one in blocks
    ]
    observers: list[BlockObserver] = [one for group in looks for one in group]
    passed = observe(
        model,
        data,
        observers,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        progress=progress,
        grad=True,
    )
    layers = []
    for block, (keys, values, effective) in zip(blocks, looks, strict=True):
        key_spectrum, value_spectrum = spectra(block, spectrum_limit)
        layer = LayerFlatness(
            name=block.name,
            form=block.form,
            neurons=block.intermediate_size,
            hidden_size=block.hidden_size,
            keys=keys.result(),
            values=values.result(),
            effective_gradient=effective.result(),
            key_spectrum=key_spectrum,
            value_spectrum=value_spectrum,
            in_place=_in_place(block),
            gives_zeros=unmixed(block.activation)[1] == 1 and gives_zeros(block.activation),
        )
        if deviation(layer) > _TOLERANCE:
            raise PatchError(
                f"the gradient in the pre-activation of {block.name} is not σ'(p) times the one in the "
                f"activation, {layer.predicted_density:.4f} of its neurons instead of {layer.density:.4f}: "
                f"{type(block.activation).__name__} is not elementwise, and the theory is not of it."
            )
        layers.append(layer)
    if not any(layer.tokens for layer in layers):
        raise ValueError(
            f"the model ran, but no token reached any of its {len(layers)} MLP blocks: something runs them "
            "by other means than their modules."
        )
    if inner_models(inner_model(without_copies(model))):  # parts that see no text, such as one for images
        layers = [layer for layer in layers if layer.tokens]
    return FlatnessReport(
        layers=tuple(layers),
        loss=passed.loss,
        tokens=passed.tokens,
        predicted_tokens=passed.predicted_tokens,
        sequence_length=passed.sequence_length,
    )


def _require_elementwise(block: Block) -> None:
    if type(unmixed(block.activation)[0]) is StatisticalTopK:
        raise PatchError(
            f"{block.name} has a statistical_topk, whose cutoff depends on all neurons of a token: its "
            "activation is not elementwise, and the theory is not of it."
        )


def _gains(model: Any) -> dict[int, Gain]:
    """By the ids of the modules of blocks, the gain of the norm that gives each its very input."""
    blocks, _ = find_blocks(model)
    try:
        norms = preceding_norms(model, blocks)
    except PatchError:  # a forward without weights does not reach them
        return {}
    gains = {}
    for block in blocks:
        norm = norms[block.place]
        if norm is None or "x" in getattr(block.module, "leaves", {}).values():
            continue
        gain = norm.whole_gain()
        if gain is not None and gain.device.type != "meta":
            bias = norm.bias
            gains[id(block.module)] = Gain(gain.float(), None if bias is None else bias.detach())
    return gains


def _in_place(block: Block) -> tuple[str, ...]:
    act, _ = unmixed(block.activation)
    has_bias = "zeroth_bias" in getattr(block.module, "leaves", {})
    return ("zeroth_bias",) * has_bias + ("jsrelu",) * isinstance(act, JSReLU)
