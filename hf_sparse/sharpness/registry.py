"""The ways to perturb, by their names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hf_sparse.checks import known, mapping, shown
from hf_sparse.sharpness.config import SharpnessConfig
from hf_sparse.sharpness.fisher_sam import FisherSamConfig
from hf_sparse.sharpness.sam import SamConfig
from hf_sparse.sharpness.sparse_sam_dynamic import SparseSamDynamicConfig
from hf_sparse.sharpness.sparse_sam_fisher import SparseSamFisherConfig

CONFIGS: dict[str, type[SharpnessConfig]] = {
    cls.name: cls for cls in (SamConfig, SparseSamFisherConfig, SparseSamDynamicConfig, FisherSamConfig)
}


def read(value: Any) -> SharpnessConfig:
    """The configuration from a mapping of ``name`` and fields, as in a recipe, or from a name alone.

    Raises:
        ValueError: names the field, its value and the mend.

    """
    given = mapping("sharpness", {"name": value} if isinstance(value, str) else value)
    name = given.pop("name", None)
    found = CONFIGS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"sharpness.name={shown(name)} is not known; choose one of {', '.join(CONFIGS)}.")
    known(f"sharpness ({name})", list(given), [f.name for f in fields(found)])
    return found(**given)
