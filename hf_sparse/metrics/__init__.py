"""What a model's activations are: how many are zero or near it, and what the model's loss is meanwhile."""

from hf_sparse.metrics.cett_ppl import cett_sparsity
from hf_sparse.metrics.cett_report import CETTReport
from hf_sparse.metrics.report import DEFINITION, LayerSparsity, SparsityReport
from hf_sparse.metrics.sparsity import measure

__all__ = ["DEFINITION", "CETTReport", "LayerSparsity", "SparsityReport", "cett_sparsity", "measure"]
