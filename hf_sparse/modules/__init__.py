"""What replaces or joins an MLP block."""

from hf_sparse.modules.leaf import ParameterLeaf
from hf_sparse.modules.sparse_mlp import SparseGatedMLP, SparseMLP, SparsePlainMLP

__all__ = ["ParameterLeaf", "SparseGatedMLP", "SparseMLP", "SparsePlainMLP"]
