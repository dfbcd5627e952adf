"""SparsityConfig: what a sparse model computes, in one validated, JSON-serialisable object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_sparse.activations.config import ACTIVATION_FIELDS, ORIGINAL, ActivationConfig
from hf_sparse.activations.statistical_topk import StatisticalTopKConfig
from hf_sparse.activations.topk import TopKConfig
from hf_sparse.checks import indices, known, mapping, shown
from hf_sparse.inputs import InputsConfig
from hf_sparse.modules.zeroth_bias import ZerothBiasConfig
from hf_sparse.norm_relu import NormReLUConfig
from hf_sparse.parts import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_sparse.adapters import Block

FORMAT_VERSION = 1

PARTS: dict[str, type[Part]] = {
    "activation": ActivationConfig,
    "statistical_topk": StatisticalTopKConfig,
    "topk": TopKConfig,
    "norm_relu": NormReLUConfig,
    "zeroth_bias": ZerothBiasConfig,
    "inputs": InputsConfig,
}
"""What the blocks of a model can have, by the name of the field in a config."""


@dataclass(frozen=True, init=False, repr=False)
class SparsityConfig:
    """What the MLP blocks of a model compute. How they are run is an argument of ``prepare`` and ``tune``.

    Args:
        activation: an :class:`~hf_sparse.ActivationConfig`, or the name of an activation.
        layers: indices of the blocks to patch, in the order of ``model.named_modules()``; None means all.
        **others: further parts, by their names in :data:`PARTS`, or what their ``to_dict`` gives; None means
            without. ``topk`` (:class:`~hf_sparse.activations.TopKConfig`), ``statistical_topk``
            (:class:`~hf_sparse.activations.StatisticalTopKConfig`), ``norm_relu`` (True;
            :class:`~hf_sparse.norm_relu.NormReLUConfig`), ``zeroth_bias``
            (:class:`~hf_sparse.modules.zeroth_bias.ZerothBiasConfig`), ``inputs`` (thresholds by names of
            linear layers; :class:`~hf_sparse.inputs.InputsConfig`).

    Raises:
        ValueError: a field is out of its range; the message names the field, the value and the mend.

    """

    activation: ActivationConfig
    layers: tuple[int, ...] | None
    others: tuple[tuple[str, Part], ...]
    """The other parts and their names, those that are present."""

    def __init__(
        self,
        /,
        *,
        activation: ActivationConfig | str | Mapping[str, Any] = "relu",
        layers: Sequence[int] | None = None,
        **others: Any,
    ) -> None:
        _refuse_unknown(list(others))
        given = {"activation": activation, **{k: v for k, v in others.items() if v is not None}}
        parts = {name: PARTS[name].read(given[name]) for name in PARTS if name in given}
        if layers is not None:
            chosen = indices("layers", layers)
            for name, part in parts.items():
                if part.blocks not in (None, len(chosen)):
                    raise ValueError(
                        f"{name} has values for {part.blocks} blocks, but layers names {len(chosen)}; give "
                        "one value, or one per layer."
                    )
            order = sorted(range(len(chosen)), key=chosen.__getitem__)
            parts = {name: part.arranged(order) for name, part in parts.items()}
            layers = tuple(sorted(chosen))
        object.__setattr__(self, "activation", parts.pop("activation"))
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "others", tuple(parts.items()))

    def __repr__(self) -> str:
        fields = {**self.parts, "layers": self.layers}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that are present, by name."""
        return {"activation": self.activation, **dict(self.others)}

    @property
    def uniform(self) -> bool:
        """Whether it says the same of every block of a model, however many there are."""
        return self.layers is None and all(part.blocks is None for part in self.parts.values())

    @property
    def gives_zeros(self) -> bool:
        """Whether it makes neurons exactly zero that the original activation does not."""
        return self.activation.name != ORIGINAL or any(part.gives_zeros for _, part in self.others)

    def changed(self, **fields: Any) -> SparsityConfig:
        """The same with other ``fields``."""
        given: dict[str, Any] = {**self.parts, "layers": self.layers, **fields}
        return SparsityConfig(**given)

    def fitted(self, model: PreTrainedModel, blocks: Sequence[Block]) -> SparsityConfig:
        """The same for ``blocks`` of ``model``, those to be patched, with what it leaves to the model.

        Raises:
            PatchError: the model cannot have one of the parts.

        """
        return self.changed(**{name: part.fitted(model, blocks) for name, part in self.parts.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with ``format_version``. Fields of a part that have their default are absent."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        layers = None if self.layers is None else list(self.layers)
        return {"format_version": FORMAT_VERSION, **parts, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityConfig:
        """Read what :meth:`to_dict` wrote, treating it as untrusted input.

        Raises:
            ValueError: a newer ``format_version``, an unknown field, or a bad value.

        """
        values = mapping("a sparsity config", data)
        version = values.pop("format_version", FORMAT_VERSION)
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={shown(version)} cannot be read; this hf_sparse reads version "
                f"{FORMAT_VERSION}. If it is newer, upgrade with `pip install -U hf-sparse`."
            )
        _refuse_unknown(list(values))
        return cls(**values)

    @classmethod
    def read(cls, value: Any, **fields: Any) -> SparsityConfig:
        """What stands for a config: one, what its ``to_dict`` gives, or the name of an activation.

        Args:
            value: the one or the other.
            **fields: with a name, the fields of its part and of the config, such as ``threshold=0.01``.

        Raises:
            ValueError: ``value`` is none of them, or a field is out of its range.

        """
        if isinstance(value, str):
            own = {k: v for k, v in fields.items() if k != "layers" and k not in PARTS}
            if unknown := sorted(own.keys() - {*ACTIVATION_FIELDS, "name", "activation"}):
                raise ValueError(
                    f"unknown fields of the patch: {', '.join(unknown)}; known: those of the activation "
                    f"({', '.join(sorted(ACTIVATION_FIELDS))}), layers, {', '.join(PARTS)}."
                )
            rest = {k: v for k, v in fields.items() if k not in own}
            if "name" in own or "activation" in rest:
                raise ValueError(f"the activation is named twice: {shown(value)}, and in {shown(fields)}.")
            return cls(activation={"name": value, **own}, **rest)
        if fields:
            raise ValueError(
                f"give {', '.join(fields)} in the SparsityConfig, or the activation as a name: "
                'patch(model, "fatrelu", threshold=0.01).'
            )
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, cls):
            raise ValueError(
                f"config={shown(value)} is neither a SparsityConfig nor the name of an activation, such as "
                '"relu".'
            )
        return value


def _refuse_unknown(names: list[str]) -> None:
    try:
        known("the config", names, [*PARTS, "layers"])
    except ValueError as error:
        if inner := [name for name in names if name in ACTIVATION_FIELDS]:
            raise ValueError(
                f"{error} {inner[0]} is a field of the activation: {{'activation': {{'name': ..., "
                f"'{inner[0]}': ...}}}}, or patch(model, name, {inner[0]}=...)."
            ) from None
        raise
