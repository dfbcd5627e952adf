"""What a model's activations are: how many are exactly zero, and what the model's loss is meanwhile."""

from hf_sparse.measure.report import DEFINITION, LayerSparsity, SparsityReport
from hf_sparse.measure.sparsity import measure

__all__ = ["DEFINITION", "LayerSparsity", "SparsityReport", "measure"]
