"""Sparsity without training: thresholds from a look at the activations."""

from hf_sparse.calibration.calibrate import calibrate
from hf_sparse.calibration.report import CalibrationReport

__all__ = ["CalibrationReport", "calibrate"]
