"""What raises the sparsity of a model that is trained: the thresholds of its activation, or a penalty."""

from hf_sparse.levers.by_penalty import ByPenalty
from hf_sparse.levers.by_threshold import ByThreshold, has_thresholds, why_not
from hf_sparse.levers.goal import Goal

__all__ = ["ByPenalty", "ByThreshold", "Goal", "has_thresholds", "why_not"]
