"""TEAL: thresholds on the inputs of all linear layers (arXiv 2408.14690)."""

from __future__ import annotations

from hf_sparse.calibration.input_values import InputMagnitudes
from hf_sparse.calibration.of_inputs import OfInputs


class Method(OfInputs):
    """``x_j`` is taken for zero where ``|x_j| <= t`` (equation 2), with t a quantile of ``|x|``."""

    seen_by = InputMagnitudes
