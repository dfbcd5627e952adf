"""What replaces an MLP block."""

from hf_sparse.modules.roles import Roles
from hf_sparse.modules.sparse_mlp import SparseGatedMLP, SparseMLP, SparsePlainMLP

__all__ = ["Roles", "SparseGatedMLP", "SparseMLP", "SparsePlainMLP"]
