"""The two published laws of the activation ratio, and the constants they were published with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Form = Literal["relu", "silu"]
FORMS: tuple[Form, ...] = ("relu", "silu")

UNIT = 1e9
"""Tokens in the unit that the constants of the paper are in."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The activation ratio A, the share of neurons that are not silent, after D billion tokens of training.

    ``"relu"``: ``A(D) = exp(-c D^alpha + b) + limit``, which falls; ``"silu"``:
    ``A(D) = limit - c / D^alpha``, which rises. Sparsing Law, arXiv 2411.02335, whose ``A_0`` is ``limit``.

    Raises:
        ValueError: the constants are not of such a curve.

    """

    form: Form
    alpha: float
    """Exponent of the tokens, above 0."""
    c: float
    """Above 0, for D in billions of tokens."""
    b: float | None = None
    """Of ``"relu"`` alone."""
    limit: float
    """The ratio without end of training, 0 to 1."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is not known; use one of {', '.join(FORMS)}.")
        if (self.b is None) != (self.form == "silu"):
            raise ValueError(f"b={self.b} with form={self.form!r}: the form 'relu' has a b, 'silu' has none.")
        for name, value, low, high in (
            ("alpha", self.alpha, 0.0, math.inf),
            ("c", self.c, 0.0, math.inf),
            ("b", self.b or 0.0, -math.inf, math.inf),
            ("limit", self.limit, 0.0, 1.0),
        ):
            inside = low <= value <= high and math.isfinite(value)
            if not inside or (name in ("alpha", "c") and value == 0):
                raise ValueError(f"{name}={value} is out of range for a law of the activation ratio.")

    def __call__(self, tokens: float) -> float:
        """The ratio after ``tokens`` tokens (not billions); below 0 where a ``"silu"`` curve has no meaning.

        Raises:
            ValueError: no positive number of tokens.

        """
        power = (require_tokens(tokens) / UNIT) ** self.alpha
        if self.b is None:
            return self.limit - self.c / power
        return math.exp(self.b - self.c * power) + self.limit

    def __str__(self) -> str:
        if self.b is None:
            return f"A(D) = {self.limit:.4g} - {self.c:.4g} / D^{self.alpha:.4g}"
        return f"A(D) = exp(-{self.c:.4g} D^{self.alpha:.4g} {self.b:+.4g}) + {self.limit:.4g}"


def require_tokens(tokens: float) -> float:
    """``tokens``, a positive number.

    Raises:
        ValueError: it is none.

    """
    number = isinstance(tokens, int | float) and not isinstance(tokens, bool)
    if not number or not 0 < tokens < math.inf:
        raise ValueError(f"tokens={tokens!r} is no positive number of training tokens.")
    return float(tokens)


def _published() -> dict[tuple[Form, str], Curve]:
    relu = {
        "0.1B": (0.101, 3.20, -1.51e-2, 6.14e-2),
        "0.2B": (0.449, 0.286, -3.05, 6.74e-2),
        "0.4B": (0.683, 7.90e-2, -3.46, 6.90e-2),
        "0.8B": (1.01, 7.97e-3, -3.49, 7.21e-2),
        "1.2B": (1.33, 9.03e-4, -3.89, 7.82e-2),
        "2.4B": (1.53, 1.56e-4, -3.46, 6.48e-2),
    }
    silu = {
        "0.1B": (0.479, 0.102, 0.409),
        "0.2B": (0.844, 0.208, 0.390),
        "0.4B": (1.03, 0.420, 0.385),
        "0.8B": (0.995, 0.562, 0.383),
        "1.2B": (0.967, 0.538, 0.382),
    }
    found: dict[tuple[Form, str], Curve] = {}
    for size, (alpha, c, b, limit) in relu.items():
        found["relu", size] = Curve(form="relu", alpha=alpha, c=c, b=b, limit=limit)
    for size, (alpha, c, limit) in silu.items():
        found["silu", size] = Curve(form="silu", alpha=alpha, c=c, limit=limit)
    return found


PUBLISHED = MappingProxyType(_published())
"""The curves of arXiv 2411.02335 by form and size of the model, such as ``("relu", "2.4B")``. Their ratio is
one minus the sparsity at CETT-PPL-1 % (:func:`hf_sparse.cett_sparsity`), not that of exact zeros."""
