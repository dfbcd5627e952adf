"""WINA: thresholds on the inputs of all linear layers, weighted by columns' norms (arXiv 2505.19427)."""

from __future__ import annotations

from hf_sparse.calibration.input_values import WeightedMagnitudes
from hf_sparse.calibration.of_inputs import OfInputs


class Method(OfInputs):
    """``x_j`` is taken for zero where ``|x_j| |W_j|`` is small, with ``|W_j|`` the norm of column j of W.

    The threshold is a quantile of that score. The paper keeps the k largest scores of each token; a threshold
    needs no selection in every layer and step.
    """

    seen_by = WeightedMagnitudes
