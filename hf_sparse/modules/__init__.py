"""What replaces or joins an MLP block."""

from hf_sparse.modules.leaf import ParameterLeaf
from hf_sparse.modules.sparse_block import SparseBlock
from hf_sparse.modules.sparse_experts import SparseExperts
from hf_sparse.modules.sparse_mlp import SparseMLP

__all__ = ["ParameterLeaf", "SparseBlock", "SparseExperts", "SparseMLP"]
