"""SCAP: thresholds on the inputs of the MLP's linear layers, around their mode (arXiv 2412.07174)."""

from __future__ import annotations

from hf_sparse.calibration.input_values import SignedValues
from hf_sparse.calibration.of_inputs import OfInputs


class Method(OfInputs):
    """``x_j`` is taken for c where ``|x_j - c| <= t``, with t a quantile of that distance.

    c is, for each layer, that of 0, the median and the mode of x around which least is lost; the paper has
    the three and chooses by hand.
    """

    allocations = ("uniform",)

    counts = "the weights of all linear layers of MLP blocks that meet an input without effect"

    seen_by = SignedValues

    mlp_alone = True
