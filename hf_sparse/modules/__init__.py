"""What replaces or joins an MLP block."""

from hf_sparse.modules.decoding_linear import (
    DecodingLinear,
    decode_linears,
    require_stock_linears,
    stock_linears,
)
from hf_sparse.modules.kept_block import KeptBlock, KeptChange, sparse_part, sparse_parts, stock_downs
from hf_sparse.modules.leaf import ParameterLeaf
from hf_sparse.modules.output_layer import OutputLayer
from hf_sparse.modules.sparse_block import SparseBlock
from hf_sparse.modules.sparse_experts import SparseExperts
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.modules.sparse_mlp import SparseGatedMLP, SparseMLP, SparsePlainMLP

__all__ = [
    "DecodingLinear",
    "KeptBlock",
    "KeptChange",
    "OutputLayer",
    "ParameterLeaf",
    "SparseBlock",
    "SparseExperts",
    "SparseGatedMLP",
    "SparseLinear",
    "SparseMLP",
    "SparsePlainMLP",
    "decode_linears",
    "require_stock_linears",
    "sparse_part",
    "sparse_parts",
    "stock_downs",
    "stock_linears",
]
