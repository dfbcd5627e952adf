"""The module of each activation, and back: which row of the operators' table a module is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.activations import ACT2CLS, ReLUSquaredActivation

from hf_sparse.activations.cats import CLASSES
from hf_sparse.activations.relu_family import FATReLU, JSReLU, JSReLULinear, ShiftedReLU
from hf_sparse.activations.statistical_topk import StatisticalTopK
from hf_sparse.activations.topk import TopKActivation
from triton_ops.activations import TABLE

if TYPE_CHECKING:
    from hf_sparse.activations.config import ActivationConfig

MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": ReLUSquaredActivation,
    "shifted_relu": ShiftedReLU,
    "fatrelu": FATReLU,
    "drelu": nn.ReLU,  # the block does as much to its up projection
    "jsrelu": JSReLU,
    "jsrelu_linear": JSReLULinear,
    **CLASSES,
}
"""The class for each row of :data:`triton_ops.activations.TABLE`. It is called with the row's parameter, if
there is one, and keeps it as an attribute of that name.

ReLU and squared ReLU are the classes that transformers builds, so that a model with them is a stock model.
"""

_FORWARDS = {cls: cls.forward for cls in MODULES.values()}
_NAMES = {(cls, TABLE[name].relu_up): name for name, cls in MODULES.items()}


def build_activation(config: ActivationConfig, index: int, original: nn.Module) -> nn.Module:
    """The activation of the ``index``-th patched block, not mixed; ``original`` is the block's own."""
    if config.name not in MODULES:
        return original
    if TABLE[config.name].parameter is None:
        return MODULES[config.name]()
    value = config.parameter
    return MODULES[config.name](value[index] if isinstance(value, tuple) else value)


def row_of(activation: nn.Module, *, relu_up: bool = False) -> tuple[str, float] | None:
    """The operators' name for an activation module, and its parameter; None if they do not know it.

    Recognising the module rather than the config also finds models that are sparse as they come, such as
    OPT (ReLU) and Nemotron (squared ReLU). A subclass may compute anything and is not known.

    Args:
        activation: of the gate, or of the up projection of a plain MLP.
        relu_up: whether the up projection of a gated MLP goes through ReLU as well.

    """
    name = _NAMES.get((type(activation), relu_up))
    # Somebody may have replaced the forward of the class.
    if name is None or type(activation).forward is not _FORWARDS[type(activation)]:
        return None
    parameter = TABLE[name].parameter
    return name, 0.0 if parameter is None else getattr(activation, parameter.name)


def gives_zeros(activation: nn.Module) -> bool:
    """Whether an activation module is known to be exactly zero for silent neurons."""
    return type(activation) in (StatisticalTopK, TopKActivation) or row_of(activation) is not None


def relu_up(name: str) -> bool:
    """Whether the activation of a config is also a ReLU on the up projection."""
    return name in TABLE and TABLE[name].relu_up


def is_stock(name: str) -> bool:
    """Whether stock transformers calls the same module by the same name."""
    return name in MODULES and ACT2CLS.get(name) is MODULES[name]
