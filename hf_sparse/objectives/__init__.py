"""Terms added to a training loss to make activations sparse."""

from hf_sparse.objectives.l1 import L1Penalty

__all__ = ["L1Penalty"]
