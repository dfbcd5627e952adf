"""ActivationConfig: which activation a model has, as a part of its SparsityConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_sparse.activations.build import relu_up, row_of
from hf_sparse.activations.mixed import unmixed
from hf_sparse.activations.statistical_topk import StatisticalTopK
from hf_sparse.checks import known, mapping, number, numbers, shown
from hf_sparse.errors import PatchError
from hf_sparse.parts import Part
from triton_ops.activations import TABLE

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

ORIGINAL = "original"

ACTIVATIONS = (ORIGINAL, *TABLE)
"""Names of activations. ``"original"`` keeps the model's own."""

_OWNERS: dict[str, list[str]] = {}
for _row in TABLE.values():
    if _row.parameter is not None:
        _OWNERS.setdefault(_row.parameter.name, []).append(_row.name)

ACTIVATION_FIELDS = ("name", *_OWNERS, "mix")
"""Every field that an activation can have."""


@dataclass(frozen=True, init=False, repr=False)
class ActivationConfig(Part):
    """The activation that takes the place of the model's own.

    ========================  ===============================================================
    ``"original"``            the model's own activation, unchanged
    ``"relu"``                ``max(p, 0)``
    ``"relu2"``               ``max(p, 0)**2`` (Primer; ReLU² Wins, arXiv 2402.03804)
    ``"shifted_relu"``        ``max(p - shift, 0)`` (ReLU Strikes Back, arXiv 2310.04564)
    ``"fatrelu"``             ``p if p >= threshold else 0`` (ProSparse, arXiv 2402.13516)
    ``"drelu"``               ReLU on gate and up, gated blocks only (TurboSparse, arXiv 2406.05955)
    ``"jsrelu"``              ``p + p**2 / 2 if p >= 0 else 0`` (J-SquaredReLU, arXiv 2605.25612)
    ``"jsrelu_linear"``       the same up to 4, its tangent ``12 + 5 * (p - 4)`` beyond
    ``"cats_silu"``           ``a if |a| >= threshold else 0`` with ``a = silu(p)``, in models that have SiLU
                              (CATS, arXiv 2404.08763)
    ``"cats_gelu"``           the same of GELU, in models that have that
    ``"cats_gelu_tanh"``      the same of its approximation with tanh, ``"gelu_new"`` and its like included
    ========================  ===============================================================

    Raises:
        ValueError: a field is out of its range; the message names the field, the value and the mend.

    """

    name: str
    """One of :data:`ACTIVATIONS`."""

    parameter: float | tuple[float, ...]
    """The number that the activation takes, or one per patched block, in the order of ``layers`` if that is
    given, else of ``model.named_modules()``. It is given, read and saved under its own name: ``threshold``
    (at least 0) of ``"fatrelu"`` and ``"cats_..."``, ``shift`` of ``"shifted_relu"``; in units of the
    pre-activation, that of ``"cats_..."`` of the activation's value. Default 0, and 0 where there is none."""

    mix: float
    """Share k in [0, 1] of the new activation: ``(1 - k) * original(p) + k * new(p)``. A finetune raises it
    from 0 to 1; below 1 no neuron is exactly silent and the model runs dense."""

    def __init__(
        self, /, *, name: str = "relu", mix: float = 1.0, **parameter: float | Sequence[float]
    ) -> None:
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ValueError(
                f"activation.name={shown(name)} is not known; choose one of {', '.join(ACTIVATIONS)}."
            )
        own = TABLE[name].parameter if name in TABLE else None
        value: float | tuple[float, ...] = 0.0
        for key, given in parameter.items():
            if own is not None and key == own.name:
                value = numbers(f"activation.{key}", given)
                for one in value if isinstance(value, tuple) else (value,):
                    if one < own.least:
                        raise ValueError(
                            f"activation.{key}={one} is too small; that of {name} is at least {own.least:g}."
                        )
            elif key in _OWNERS:
                raise ValueError(
                    f"activation.{key}={shown(given)} has no meaning for {name!r}; use "
                    f"{' or '.join(map(repr, _OWNERS[key]))}, or leave {key} out."
                )
            else:
                known("activation", [key], ["name", *([own.name] if own else []), "mix"])
        mix = number("activation.mix", mix)
        if not 0 <= mix <= 1:
            raise ValueError(
                f"activation.mix={mix} is outside [0, 1]; it is the share of the new activation."
            )
        if name == ORIGINAL and mix != 1:
            raise ValueError(f"activation.mix={mix} has no meaning for {name!r}; leave it out.")
        for field, checked in (("name", name), ("parameter", value), ("mix", mix)):
            object.__setattr__(self, field, checked)

    def __getattr__(self, name: str) -> Any:
        row = TABLE.get(vars(self).get("name", ""))
        if row is not None and row.parameter is not None and row.parameter.name == name:
            return self.parameter
        raise AttributeError(f"{type(self).__name__} of {vars(self).get('name')!r} has no {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._given().items())})"

    @property
    def relu_up(self) -> bool:
        """Whether the up projection of a gated MLP goes through ReLU as well."""
        return relu_up(self.name)

    @property
    def blocks(self) -> int | None:
        return len(self.parameter) if isinstance(self.parameter, tuple) else None

    def with_mix(self, k: float) -> ActivationConfig:
        """The same with another ``mix``.

        Raises:
            ValueError: it is outside [0, 1], or the activation is the original one.

        """
        return ActivationConfig(**{**self._given(), "mix": k})

    def arranged(self, order: Sequence[int]) -> ActivationConfig:
        if not isinstance(self.parameter, tuple):
            return self
        values = tuple(self.parameter[i] for i in order)
        return ActivationConfig(**{**self._given(), self._parameter_name(): values})

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self._given().items()}

    @classmethod
    def read(cls, value: Any) -> ActivationConfig:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(name=value)
        return cls(**mapping("activation", value))

    def check(self, block: Block) -> None:
        if not self.relu_up:
            return
        if block.form == "plain":
            raise PatchError(
                f"activation.name={self.name!r} needs a gated MLP, but {block.name} "
                f'({block.stock_class.__name__}) has no gate; use "relu".'
            )
        if not block.roles.takes_relu_up(block.module):
            raise PatchError(
                f"activation.name={self.name!r} computes the block itself, but {block.name} has more in it "
                'than projections and an activation; use "relu".'
            )

    def found_in(self, blocks: Sequence[Block]) -> ActivationConfig:
        found = [_found(block, self) for block in blocks]
        if len({(one.name, one.mix) for one in found}) > 1:
            first = found[0]
            other = next(i for i, one in enumerate(found) if (one.name, one.mix) != (first.name, first.mix))
            raise PatchError(
                f"the activations of the patched blocks differ: {first} at {blocks[0].name}, {found[other]} "
                f"at {blocks[other].name}; a config can say one kind. Patch the model again with one of them."
            )
        values = tuple(one.parameter for one in found)
        if self.blocks is None and len(set(values)) == 1:
            return found[0]
        given = {**found[0]._given()}
        if (own := TABLE[found[0].name].parameter if found[0].name in TABLE else None) is not None:
            given[own.name] = values
        return ActivationConfig(**given)

    def _given(self) -> dict[str, Any]:
        """The arguments that make this config; those with their default are left out."""
        given: dict[str, Any] = {"name": self.name}
        if self.parameter != 0:
            given[self._parameter_name()] = self.parameter
        if self.mix != 1:
            given["mix"] = self.mix
        return given

    def _parameter_name(self) -> str:
        own = TABLE[self.name].parameter
        assert own is not None
        return own.name


def _found(block: Block, said: ActivationConfig) -> ActivationConfig:
    """The activation of a patched block, read off its modules."""
    act, mix = unmixed(block.activation)
    if isinstance(act, StatisticalTopK):
        act = act.activation
    if said.name == ORIGINAL and same_function(act, block.original_activation):
        return said
    row = None if "forward" in vars(act) else row_of(act, relu_up=getattr(block.module, "relu_up", False))
    if row is None:
        raise PatchError(
            f"the config of the model says {said}, but {block.name} has {act} as its activation, which no "
            "config can say. Put the activation back, patch the model again, or hf_sparse.unpatch(model)."
        )
    name, value = row
    own = TABLE[name].parameter
    return ActivationConfig(name=name, mix=mix, **({} if own is None else {own.name: value}))


def same_function(a: object, b: object) -> bool:
    """Whether two activation modules are of one class with the same settings."""

    def settings(module: object) -> dict[str, Any]:
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        return {k: v for k, v in own.items() if isinstance(v, int | float | str)}

    return type(a) is type(b) and settings(a) == settings(b)
