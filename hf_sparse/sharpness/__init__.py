"""Sharpness-aware minimisation around any torch optimizer: SAM, Sparse SAM, Fisher SAM."""

from hf_sparse.sharpness.config import SharpnessConfig
from hf_sparse.sharpness.fisher_sam import FisherSamConfig
from hf_sparse.sharpness.optimizer import SAM
from hf_sparse.sharpness.perturbation import Perturbation
from hf_sparse.sharpness.registry import read
from hf_sparse.sharpness.sam import SamConfig
from hf_sparse.sharpness.sparse_sam_dynamic import SparseSamDynamicConfig
from hf_sparse.sharpness.sparse_sam_fisher import SparseSamFisherConfig

__all__ = [
    "SAM",
    "FisherSamConfig",
    "Perturbation",
    "SamConfig",
    "SharpnessConfig",
    "SparseSamDynamicConfig",
    "SparseSamFisherConfig",
    "read",
]
