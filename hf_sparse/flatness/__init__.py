"""Why neurons are silent: density as augmented flatness over input norm and activation gradient.

Source: Peng et al., arXiv 2309.03004 and 2605.25612, and the code released with them. ``docs/theory.md`` has
the formulas, and says what is exact and what is conjectured.
"""

from hf_sparse.flatness.effective_gradient import EffectiveGradient, EffectiveGradientSums
from hf_sparse.flatness.explaining import explain
from hf_sparse.flatness.keys import KeyFlatness, KeySums
from hf_sparse.flatness.layer import LayerFlatness
from hf_sparse.flatness.outlook import Outlook
from hf_sparse.flatness.report import FlatnessReport
from hf_sparse.flatness.spectrum import Spectrum, spectrum
from hf_sparse.flatness.values import ValueFlatness, ValueSums

__all__ = [
    "EffectiveGradient",
    "EffectiveGradientSums",
    "FlatnessReport",
    "KeyFlatness",
    "KeySums",
    "LayerFlatness",
    "Outlook",
    "Spectrum",
    "ValueFlatness",
    "ValueSums",
    "explain",
    "spectrum",
]
