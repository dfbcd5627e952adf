"""What replaces an MLP block."""

from hf_sparse.modules.sparse_mlp import SparseGatedMLP, SparseMLP, SparsePlainMLP

__all__ = ["SparseGatedMLP", "SparseMLP", "SparsePlainMLP"]
