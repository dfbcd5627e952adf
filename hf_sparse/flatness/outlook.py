"""What the three modules of the papers would change of the ratio, as far as the theory says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hf_sparse.flatness.keys import KeySums


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Of one module, for one block (arXiv 2605.25612)."""

    module: Literal["zeroth_bias", "restricted_norm", "jsrelu"]
    acts_on: Literal["numerator", "denominator"]
    """Of the ratio: the augmented flatness, or C."""
    factor: float | None
    """What C would be multiplied by at once, with the weights, the gradients and the active neurons as they
    are; None if the identity has no number for it. That the density is divided by as much in the end is a
    conjecture: AF_K grows along with C at once, and only training can bring it back."""
    note: str
    """Why there is no number, or what else is to be known; may be empty."""


def outlooks(sums: KeySums, *, in_place: tuple[str, ...], gives_zeros: bool) -> tuple[Outlook, ...]:
    """Those of a block: zeroth bias, restricted norm, J-SquaredReLU.

    Args:
        sums: of its key matrix.
        in_place: the modules that it has.
        gives_zeros: whether its activation is known to give exact zeros.

    """
    bias = "in place" if "zeroth_bias" in in_place else "acts through the noise of training: no number"
    lifted, uplift_note = _over(sums.uplifted_product, sums.product), ""
    if lifted is None:
        uplift_note = "no norm is known to give the block its very input"
    elif lifted == 1:
        uplift_note = "in place: no gain is below 1"
    if "jsrelu" in in_place:
        jump, jump_note = None, "in place"
    elif not gives_zeros:
        jump, jump_note = None, "the activation is dense: another one changes what is active, too"
    else:
        now, then = _over(sums.product, sums.active), _over(sums.jsrelu_product, sums.positive)
        jump, jump_note = None if now is None or then is None else _over(then, now), ""
    return (
        Outlook(module="zeroth_bias", acts_on="numerator", factor=None, note=bias),
        Outlook(module="restricted_norm", acts_on="denominator", factor=lifted, note=uplift_note),
        Outlook(module="jsrelu", acts_on="denominator", factor=jump, note=jump_note),
    )


def _over(part: float, whole: float) -> float | None:
    ratio = part / whole if whole else math.nan
    return ratio if math.isfinite(ratio) else None
