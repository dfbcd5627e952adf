"""Sparsity without training: thresholds from a look at the activations."""

from hf_sparse.calibration.calibrate import calibrate
from hf_sparse.calibration.report import CalibrationReport, TriedMethod

__all__ = ["CalibrationReport", "TriedMethod", "calibrate"]
