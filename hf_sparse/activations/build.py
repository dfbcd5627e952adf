"""From the names of a SparsityConfig to modules, and from modules to the names the kernels use."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN, ReLUSquaredActivation

from hf_sparse.activations.relu_family import FATReLU, JSReLU, ShiftedReLU
from hf_sparse.config import SparsityConfig


def build_activation(config: SparsityConfig, index: int, original: nn.Module) -> nn.Module:
    """The activation of the ``index``-th patched block; ``original`` is the block's own.

    ReLU and squared ReLU are transformers' own classes, so that a model with them is a stock model.
    """
    match config.activation:
        case "original":
            return original
        case "relu" | "drelu":
            return ACT2FN["relu"]
        case "relu2":
            return ACT2FN["relu2"]
        case "jsrelu":
            return JSReLU()
        case "shifted_relu":
            return ShiftedReLU(config.shift)
        case "fatrelu":
            return FATReLU(config.threshold_at(index))
    raise AssertionError(config.activation)  # SparsityConfig has validated the name


def kernel_kind(activation: nn.Module) -> tuple[str, float] | None:
    """The operator's name and threshold for an activation module; None if it never outputs exact zeros.

    Recognising the module rather than the config also finds models that are sparse as they come, such as
    OPT (ReLU) and Nemotron (squared ReLU).
    """
    kind = type(activation)
    if kind is nn.ReLU:
        return "relu", 0.0
    if kind is ReLUSquaredActivation:
        return "relu2", 0.0
    if kind is JSReLU:
        return "jsrelu", 0.0
    if isinstance(activation, ShiftedReLU):
        return "shifted_relu", activation.shift
    if isinstance(activation, FATReLU):
        return "fatrelu", activation.threshold
    return None
