"""What a model's activations are: how many are exactly zero, and what the model's loss is meanwhile."""

from hf_sparse.metrics.report import DEFINITION, LayerSparsity, SparsityReport
from hf_sparse.metrics.sparsity import measure

__all__ = ["DEFINITION", "LayerSparsity", "SparsityReport", "measure"]
