"""What stock transformers would build from a config: found out by building it, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse.activations import is_stock
from hf_sparse.activations.config import ORIGINAL, same_function
from hf_sparse.activations.known import STOCK_ACTIVATIONS
from hf_sparse.adapters.copies import place
from hf_sparse.adapters.roles import linear_size
from hf_sparse.checkpoint_block import KEY, Record, names_activation
from hf_sparse.modules import SparseBlock

_ON_TRIAL = "_hf_sparse_on_trial"
"""Marks the config of a model that is built here, whose activation may be ours without a block."""


def refuse_missing_block(config: PretrainedConfig) -> None:
    """Refuse a config that has our activation, but no block that says what it is.

    Raises:
        ValueError: names the field.

    """
    own = vars(config)
    fields = [] if _ON_TRIAL in own else [name for name, value in own.items() if value == KEY]
    if fields:
        raise ValueError(
            f'{fields[0]}="{KEY}" needs the "{KEY}" block of a patched model, and this config has none; '
            "take it from the checkpoint that it came with, or name another activation."
        )


class UnpatchedActivation(nn.Module):
    """Stands where a config says ``"hf_sparse"`` until the patch puts the real activation there."""

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            'this MLP was built from a config whose activation is "hf_sparse", but was not patched: the '
            "model has another number of MLP blocks than the checkpoint, or only a part of it was built. "
            "Load the whole model, with all its layers, after `import hf_sparse`."
        )


def activation_field(model: PreTrainedModel, names: Iterable[str]) -> str | None:
    """The field of the config that sets the activations called ``names`` in ``model``, None if none does.

    A field that a saved config would not keep (one that is computed from another) is none.
    """
    names = list(names)
    for field, value in sorted(vars(model.config).items()):
        if names_activation(value) and _sets(model, field, names) and _is_kept(model.config, field):
            return field
    return None


def sets_activation(model: PreTrainedModel, field: str, activations: Mapping[str, nn.Module]) -> bool:
    """Whether ``field`` of the config made the stock ``activations`` (by name) of a ``model`` being built.

    They tell it themselves, unless another field says the same. Only then another model is built: this runs
    while a model is loaded, where that is best avoided.
    """
    config = model.config
    made = _stand_in(vars(config)[field])
    if not all(same_function(activation, made) for activation in activations.values()):
        return False
    alike = [
        other
        for other, value in vars(config).items()
        if names_activation(value) and same_function(_stand_in(value), made)
    ]
    return alike == [field] or _sets(model, field, list(activations))


def stock_name(model: PreTrainedModel, record: Record, blocks: Mapping[str, nn.Module]) -> str | None:
    """The activation name with which stock transformers builds the very model, None if there is none.

    ``blocks``: all MLP blocks by their places, as a patch is about to put them into ``model``.
    """
    activation = record.config.activation
    if record.config.others:
        return None
    if activation.name == ORIGINAL:
        name = record.activation
    elif is_stock(activation.name) and activation.mix == 1:
        name = activation.name
    else:
        return None
    return name if builds_same(model, record.field, name, blocks) else None


def builds_same(model: PreTrainedModel, field: str, value: str, blocks: Mapping[str, nn.Module]) -> bool:
    """Whether stock transformers, with ``field`` of the config set to ``value``, builds ``model``.

    ``blocks``: as for :func:`stock_name`; everything else is the model's own. A field may feed more than the
    MLPs (the mixers of a hybrid, a head), or a string that a forward reads; and a block may hold parameters
    that a stock block does not have.
    """
    built = _named(build_stock(model, field, value))
    if not blocks.keys() <= built.keys():
        return False
    if not all(same_tensors(block, built[name]) for name, block in blocks.items()):
        return False
    ours = {place(name): module for name, module in model.named_modules()}
    for name, block in blocks.items():
        ours.update(block.named_modules(prefix=name))
    for name, module in built.items():
        mine = ours.get(name)
        if mine is None:
            if isinstance(module, STOCK_ACTIVATIONS) and _inside(name, blocks):
                return False  # ours has the activation written into its forward
            continue
        is_activation = isinstance(module, STOCK_ACTIVATIONS) or isinstance(mine, STOCK_ACTIVATIONS)
        if is_activation and type(module) is not type(mine):
            return False
        for attribute, text in vars(module).items():
            if isinstance(text, str) and text in ACT2FN and vars(mine).get(attribute) != text:
                return False
    return True


def same_tensors(ours: nn.Module, built: nn.Module) -> bool:
    """Whether both have parameters and saved buffers of the same names and shapes.

    What another tool has put in the place of a stock module (LoRA, a quantised layer) is its own affair.
    """
    if _tensors(ours) != _tensors(built):
        return False
    for name in ours._modules.keys() | built._modules.keys():
        mine, theirs = ours._modules.get(name), built._modules.get(name)
        if mine is None or theirs is None:
            alone = mine or theirs
            if alone is not None and alone.state_dict(keep_vars=True):
                return False
        elif type(mine) is type(theirs) and not same_tensors(mine, theirs):
            return False
    return True


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Names and shapes of the module's own tensors. Linear layers declare theirs: weights may be sharded."""
    own = {**module._parameters, **module._buffers}
    held = {k: v for k, v in own.items() if v is not None and k not in module._non_persistent_buffers_set}
    size = None if isinstance(module, SparseBlock) else linear_size(module)
    if size is not None:
        return dict.fromkeys(held, size)
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in held.items()}


def _inside(name: str, blocks: Iterable[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _sets(model: PreTrainedModel, field: str, names: list[str]) -> bool:
    # Something else than it says now: another field may say that as well.
    value = "relu" if vars(model.config)[field] == KEY else KEY
    modules, made = _named(build_stock(model, field, value)), type(_stand_in(value))
    return all(type(modules.get(name)) is made for name in names)


def _is_kept(config: PretrainedConfig, field: str) -> bool:
    """Whether a value of ``field`` comes back from a saved config."""
    changed = copy.deepcopy(config)
    setattr(changed, field, KEY)
    try:
        return getattr(type(config).from_dict(changed.to_dict()), field, None) == KEY
    except Exception:  # a config that refuses the value does not keep it
        return False


def _stand_in(name: str) -> nn.Module:
    """The module that transformers makes of a name."""
    return UnpatchedActivation() if name == KEY else ACT2FN[name]


def build_stock(model: PreTrainedModel, field: str, value: str) -> PreTrainedModel | None:
    """A weightless model as ``model``, with one field of the config changed; None if it cannot be built."""
    config = copy.deepcopy(model.config)
    vars(config).pop(KEY, None)
    registered = KEY in ACT2FN
    try:
        ACT2FN[KEY] = UnpatchedActivation
        setattr(config, field, value)
        vars(config)[_ON_TRIAL] = True
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return type(model)(config)
    except Exception:  # a field that accepts no other value is not the one
        return None
    finally:
        if not registered:
            del ACT2FN[KEY]


def _named(model: nn.Module | None) -> dict[str, nn.Module]:
    return {} if model is None else dict(model.named_modules())
