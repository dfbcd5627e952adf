"""Activation functions that are exactly zero for most neurons, as modules."""

from hf_sparse.activations.build import MODULES, build_activation, is_stock, relu_up, row_of
from hf_sparse.activations.config import ActivationConfig
from hf_sparse.activations.mixed import MixedActivation
from hf_sparse.activations.relu_family import FATReLU, JSReLU, JSReLULinear, ShiftedReLU

__all__ = [
    "MODULES",
    "ActivationConfig",
    "FATReLU",
    "JSReLU",
    "JSReLULinear",
    "MixedActivation",
    "ShiftedReLU",
    "build_activation",
    "is_stock",
    "relu_up",
    "row_of",
]
