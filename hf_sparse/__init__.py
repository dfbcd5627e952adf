"""Activation-sparse MLPs for Hugging Face models: patch, finetune, run, measure."""

from typing import TYPE_CHECKING, Any

from hf_sparse._version import __version__
from hf_sparse.activations import ActivationConfig
from hf_sparse.calibration import CalibrationReport, calibrate
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.exporting import export
from hf_sparse.flatness import FlatnessReport, explain
from hf_sparse.hooks import install, uninstall
from hf_sparse.hub import push_to_hub
from hf_sparse.laws import SparsingLaw, fit_sparsing_law
from hf_sparse.metrics import CETTReport, SparsityReport, cett_sparsity, measure
from hf_sparse.patch_report import PatchReport
from hf_sparse.patching import inspect, patch, prepare, set_mix, unpatch
from hf_sparse.skipping_in_training import skip_in_training
from hf_sparse.sliding_windows import sliding_windows
from hf_sparse.tuning import TuneReport, tune
from triton_ops import backend

if TYPE_CHECKING:
    from hf_sparse.integrations.trainer import SparsityCallback

__all__ = [
    "ActivationConfig",
    "CETTReport",
    "CalibrationReport",
    "FlatnessReport",
    "PatchError",
    "PatchReport",
    "SparsingLaw",
    "SparsityCallback",
    "SparsityConfig",
    "SparsityReport",
    "TuneReport",
    "__version__",
    "backend",
    "calibrate",
    "cett_sparsity",
    "explain",
    "export",
    "fit_sparsing_law",
    "inspect",
    "install",
    "measure",
    "patch",
    "prepare",
    "push_to_hub",
    "set_mix",
    "skip_in_training",
    "sliding_windows",
    "tune",
    "uninstall",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name == "SparsityCallback":  # imports the training part of transformers
        from hf_sparse.integrations.trainer import SparsityCallback

        return SparsityCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
