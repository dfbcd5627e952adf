"""How activation sparsity changes with the tokens a model is trained on: published laws, fitted to runs."""

from hf_sparse.laws.curve import PUBLISHED, Curve
from hf_sparse.laws.fit import fit_sparsing_law
from hf_sparse.laws.points import law_points
from hf_sparse.laws.report import Prediction, SparsingLaw

__all__ = ["PUBLISHED", "Curve", "Prediction", "SparsingLaw", "fit_sparsing_law", "law_points"]
