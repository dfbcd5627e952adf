"""SparsityConfig: what a sparse model is, in one validated, JSON-serialisable object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from triton_ops.activations import TABLE

FORMAT_VERSION = 1

ACTIVATIONS = ("original", *TABLE)
"""Names accepted by :class:`SparsityConfig`. ``"original"`` keeps the model's own activation."""


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """How the MLP blocks of a model are made sparse.

    Raises:
        ValueError: a field is out of its range; the message names the field, the value and the mend.

    """

    activation: str = "relu"
    """The activation that replaces the model's own.

    ========================  ===============================================================
    ``"original"``            the model's own activation, unchanged
    ``"relu"``                ``max(p, 0)``
    ``"relu2"``               ``max(p, 0)**2`` (Primer; ReLU² Wins, arXiv 2402.03804)
    ``"shifted_relu"``        ``max(p - shift, 0)`` (ReLU Strikes Back, arXiv 2310.04564)
    ``"fatrelu"``             ``p if p >= threshold else 0`` (ProSparse, arXiv 2402.13516)
    ``"drelu"``               ReLU on gate and up, gated blocks only (TurboSparse, arXiv 2406.05955)
    ``"jsrelu"``              ``p + p**2 / 2 if p >= 0 else 0`` (J-SquaredReLU, arXiv 2605.25612)
    ========================  ===============================================================
    """

    threshold: float | tuple[float, ...] = 0.0
    """Threshold t >= 0 of ``"fatrelu"``, in units of the pre-activation: one number, or one per patched
    block, in the order of ``layers`` if that is given, else of ``model.named_modules()``."""

    shift: float = 0.0
    """Shift b of ``"shifted_relu"``, in units of the pre-activation."""

    mix: float = 1.0
    """Share k in [0, 1] of the new activation: ``(1 - k) * original(p) + k * new(p)``. A finetune raises it
    from 0 to 1; below 1 no neuron is exactly silent and the model runs dense."""

    layers: tuple[int, ...] | None = None
    """Indices of the blocks to patch, in the order of ``model.named_modules()``; None means all."""

    certify: bool = False
    """Decode single sequences without reading most of the projection that decides which neurons are active.
    A certificate of it, one byte per weight (of the gate, or of the up projection of a plain MLP) and 12 per
    neuron, proves most silent neurons silent. The result is the same, bit for bit. It takes that memory from
    the first token on and pays where few neurons are active; several tokens in a call are computed without
    it. Possible with every activation but an ``"original"`` that is never exactly zero."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not known; choose one of {', '.join(ACTIVATIONS)}."
            )
        if isinstance(self.threshold, list | tuple):
            object.__setattr__(self, "threshold", tuple(_number("threshold", t) for t in self.threshold))
        else:
            object.__setattr__(self, "threshold", _number("threshold", self.threshold))
        for t in self.thresholds:
            if t < 0:
                raise ValueError(f"threshold={t} is negative; a FATReLU threshold is at least 0.")
        if self.activation != "fatrelu" and any(self.thresholds):
            raise ValueError(
                f"threshold={self.threshold} has no meaning for activation={self.activation!r}; "
                'use activation="fatrelu" or leave threshold at 0.'
            )
        object.__setattr__(self, "shift", _number("shift", self.shift))
        if self.activation != "shifted_relu" and self.shift != 0:
            raise ValueError(
                f"shift={self.shift} has no meaning for activation={self.activation!r}; "
                'use activation="shifted_relu" or leave shift at 0.'
            )
        object.__setattr__(self, "mix", _number("mix", self.mix))
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix={self.mix} is outside [0, 1]; it is the share of the new activation.")
        if self.activation == "original" and self.mix != 1:
            raise ValueError(f'mix={self.mix} has no meaning for activation="original"; leave it at 1.')
        if not isinstance(self.certify, bool):
            raise ValueError(f"certify={self.certify!r} is neither True nor False.")
        if self.layers is None:
            return
        layers = _layers(self.layers)
        if isinstance(self.threshold, tuple):
            if len(self.threshold) != len(layers):
                raise ValueError(
                    f"threshold has {len(self.threshold)} values for {len(layers)} layers; "
                    "give one number, or one per layer."
                )
            ordered = sorted(zip(layers, self.threshold, strict=True))
            object.__setattr__(self, "threshold", tuple(t for _, t in ordered))
        object.__setattr__(self, "layers", tuple(sorted(layers)))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """``threshold`` as a tuple, of length 1 when it is one number for all blocks."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with ``format_version``."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"format_version": FORMAT_VERSION, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityConfig:
        """Read what :meth:`to_dict` wrote, treating it as untrusted input.

        Raises:
            ValueError: a newer ``format_version``, an unknown key, or a bad value.

        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a sparsity config is a mapping, not {type(data).__name__}: {data!r}.")
        values = dict(data)
        version = values.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r} cannot be read; this hf_sparse reads version {FORMAT_VERSION}. "
                "Upgrade with `pip install -U hf-sparse`."
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(map(str, values.keys() - known)):
            raise ValueError(
                f"unknown fields in the config: {', '.join(unknown)}; known: {', '.join(sorted(known))}."
            )
        return cls(**values)


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{field}={value!r} is not a finite number.")
    return float(value)


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(i) is int and i >= 0 for i in value):
        raise ValueError(f"layers={value!r} is not a sequence of block indices (integers from 0).")
    if not value:
        raise ValueError("layers=() selects no block; use None for all blocks.")
    if len(set(value)) != len(value):
        raise ValueError(f"layers={value!r} names a block twice.")
    return tuple(value)
