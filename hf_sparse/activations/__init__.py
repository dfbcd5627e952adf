"""Activation functions that are exactly zero for most neurons, as modules."""

from hf_sparse.activations.build import MODULES, build_activation, gives_zeros, is_stock, relu_up, row_of
from hf_sparse.activations.cats import CATS, CATSGELU, CATSGELUTanh, CATSSiLU
from hf_sparse.activations.config import ActivationConfig
from hf_sparse.activations.mixed import MixedActivation
from hf_sparse.activations.relu_family import FATReLU, JSReLU, JSReLULinear, ShiftedReLU
from hf_sparse.activations.statistical_topk import StatisticalTopK, StatisticalTopKConfig
from hf_sparse.activations.topk import TopKConfig

__all__ = [
    "CATS",
    "CATSGELU",
    "MODULES",
    "ActivationConfig",
    "CATSGELUTanh",
    "CATSSiLU",
    "FATReLU",
    "JSReLU",
    "JSReLULinear",
    "MixedActivation",
    "ShiftedReLU",
    "StatisticalTopK",
    "StatisticalTopKConfig",
    "TopKConfig",
    "build_activation",
    "gives_zeros",
    "is_stock",
    "relu_up",
    "row_of",
]
