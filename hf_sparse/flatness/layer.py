"""One MLP block's account of its density."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from hf_sparse.flatness.effective_gradient import EffectiveGradientSums
from hf_sparse.flatness.keys import KeySums
from hf_sparse.flatness.outlook import Outlook, outlooks
from hf_sparse.flatness.spectrum import Spectrum
from hf_sparse.flatness.values import ValueSums


@dataclass(frozen=True, kw_only=True)
class LayerFlatness:
    """One MLP block, over T tokens, n neurons and D hidden units; means are NaN if nothing was there.

    ``density = AF_K / (T n C)`` holds exactly, C being the mean of ``g² σ'² |x|²`` over active neurons, those
    with ``σ' ≠ 0``: see :class:`~hf_sparse.flatness.KeySums` for the symbols. Gradients are those of the
    summed loss of a sequence, in nats.
    """

    name: str
    """Qualified name of the block, as in ``model.get_submodule(name)``."""
    form: Literal["gated", "plain"]
    neurons: int
    """n, the intermediate size."""
    hidden_size: int
    """D."""
    keys: KeySums
    values: ValueSums
    effective_gradient: EffectiveGradientSums
    key_spectrum: Spectrum | None = None
    """None if it was not asked for, or the matrix is too large, or not there as one."""
    value_spectrum: Spectrum | None = None
    in_place: tuple[str, ...] = ()
    """Which of ``"zeroth_bias"`` and ``"jsrelu"`` the block has."""
    gives_zeros: bool = False
    """Whether its activation is known to give exact zeros."""

    @property
    def tokens(self) -> int:
        """T, without padding."""
        return self.keys.tokens

    @property
    def density(self) -> float:
        """Share of neurons with ``σ'(p) ≠ 0``, counted: what the theory is about. 1 of SiLU and GELU."""
        return _mean(self.keys.active, self.tokens * self.neurons)

    @property
    def activation_density(self) -> float:
        """Share of the down projection's inputs that are not zero, as :func:`hf_sparse.measure` has it."""
        return _mean(self.values.nonzeros, self.values.tokens * self.neurons)

    @property
    def positive_density(self) -> float:
        """Share of neurons with ``p > 0``: the density that ReLU would begin with at these inputs."""
        return _mean(self.keys.positive, self.tokens * self.neurons)

    @property
    def key_flatness(self) -> float:
        """``AF_K / T``, the mean of ``|∂L/∂p|² |x|²`` over tokens: the numerator. Smaller is flatter."""
        return _mean(self.keys.flatness, self.tokens)

    @property
    def value_flatness(self) -> float:
        """``AF_V / T``, the mean of ``|∂L/∂z|² |h|²`` over tokens."""
        return _mean(self.values.flatness, self.values.tokens)

    @property
    def coefficient(self) -> float:
        """C, the mean of ``g² σ'² |x|²`` over active neurons: the denominator, for each neuron."""
        return _mean(self.keys.product, self.keys.active)

    @property
    def predicted_density(self) -> float:
        """``AF_K / (T n C)``: from gradients and inputs alone. The same as ``density``, to rounding."""
        return _mean(self.keys.flatness, self.tokens * self.neurons * self.coefficient)

    @property
    def input_norm(self) -> float:
        """Mean of ``|x|²`` over tokens."""
        return _mean(self.keys.inputs, self.tokens)

    @property
    def activation_gradient(self) -> float:
        """Mean of ``g²`` over active neurons."""
        return _mean(self.keys.gradients, self.keys.active)

    @property
    def slope(self) -> float:
        """Mean of ``σ'²`` over active neurons; 1 of ReLU."""
        return _mean(self.keys.slopes, self.keys.active)

    @property
    def factor(self) -> float:
        """What the up projection of a gated block multiplies the squared gradient by: a mean of ``u²``.

        The mean of ``g²`` over that of ``(∂L/∂h)²``. 1 of a plain block.
        """
        return _mean(self.keys.gradients, self.keys.down_gradients)

    @property
    def coupling(self) -> float:
        """``C / (input_norm · activation_gradient · slope)``: above 1 if the three are large together."""
        return _mean(self.coefficient, self.input_norm * self.activation_gradient * self.slope)

    @property
    def effective_gradient_density(self) -> float:
        """Share of entries of ``∂L/∂p`` that are not exactly zero."""
        seen = self.effective_gradient
        return _mean(seen.tokens * self.neurons - seen.zeros, seen.tokens * self.neurons)

    @property
    def effective_gradient_share(self) -> float:
        """Mean of ``|η|₁² / (n |η|₂²)`` over tokens, 0 to 1: on what share of the neurons ``η = ∂L/∂p`` lies.

        It says something of a dense activation, too, where no entry is zero.
        """
        return _mean(self.effective_gradient.shares, self.effective_gradient.tokens)

    @property
    def outlooks(self) -> tuple[Outlook, ...]:
        """What zeroth bias, restricted norm and J-SquaredReLU would change of the ratio."""
        return outlooks(self.keys, in_place=self.in_place, gives_zeros=self.gives_zeros)

    def __add__(self, other: LayerFlatness) -> LayerFlatness:
        """The same block over the tokens of both.

        Raises:
            ValueError: they are not one block with the same weights.

        """
        fields = ("name", "form", "neurons", "hidden_size", "in_place", "gives_zeros")
        same = all(getattr(self, one) == getattr(other, one) for one in fields)
        if not same or not _alike(self.key_spectrum, other.key_spectrum):
            raise ValueError(
                f"{self.name} of {self.neurons} neurons and {other.name} of {other.neurons} are not one "
                "block with the same weights; only reports of the same model add up."
            )
        return replace(
            self,
            keys=self.keys + other.keys,
            values=self.values + other.values,
            effective_gradient=self.effective_gradient + other.effective_gradient,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not finite is None."""
        return {
            "name": self.name,
            "form": self.form,
            "neurons": self.neurons,
            "hidden_size": self.hidden_size,
            "tokens": self.tokens,
            **{name: _finite(getattr(self, name)) for name in _MEANS},
            "in_place": list(self.in_place),
            "key_spectrum": _spectrum(self.key_spectrum),
            "value_spectrum": _spectrum(self.value_spectrum),
            "outlooks": [
                {"module": one.module, "acts_on": one.acts_on, "factor": one.factor, "note": one.note}
                for one in self.outlooks
            ],
        }


_MEANS = (
    "density",
    "predicted_density",
    "activation_density",
    "positive_density",
    "key_flatness",
    "value_flatness",
    "coefficient",
    "input_norm",
    "activation_gradient",
    "slope",
    "factor",
    "coupling",
    "effective_gradient_density",
    "effective_gradient_share",
)


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _alike(one: Spectrum | None, other: Spectrum | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one.norm_squared, other.norm_squared, rel_tol=1e-6)


def _spectrum(one: Spectrum | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "ratio": _finite(one.ratio),
        "ratio_80": _finite(one.ratio_80),
        "rank": one.rank,
        "size": one.size,
        "largest": one.largest,
        "smallest": one.smallest,
        "norm_squared": one.norm_squared,
    }
