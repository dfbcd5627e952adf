"""Terms added to a training loss."""

from hf_sparse.objectives.block_matching import BlockMatching
from hf_sparse.objectives.kl import kl_divergence
from hf_sparse.objectives.l1 import L1Penalty

__all__ = ["BlockMatching", "L1Penalty", "kl_divergence"]
