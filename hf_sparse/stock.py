"""What stock transformers would build from a config: found out by building it, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse.activations.known import STOCK_ACTIVATIONS
from hf_sparse.checkpoint_block import KEY


class UnpatchedActivation(nn.Module):
    """Stands where a config says ``"hf_sparse"`` until the patch puts the real activation there."""

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            'this MLP was built from a config whose activation is "hf_sparse", but was not patched: the '
            "model has another number of MLP blocks than the checkpoint, or only a part of it was built. "
            "Load the whole model, with all its layers, after `import hf_sparse`."
        )


def activation_field(model: PreTrainedModel, config: PretrainedConfig, names: Iterable[str]) -> str | None:
    """The field of ``config`` that sets the activations called ``names`` in ``model``, None if none does."""
    names = list(names)
    for field, value in sorted(vars(config).items()):
        if not isinstance(value, str) or value not in ACT2FN:
            continue
        modules = _build(model, config, field, KEY)
        if all(isinstance(modules.get(name), UnpatchedActivation) for name in names):
            return field
    return None


def builds_same(
    model: PreTrainedModel,
    config: PretrainedConfig,
    field: str,
    value: str,
    activations: Mapping[str, nn.Module],
) -> bool:
    """Whether stock transformers, with ``field`` set to ``value``, builds ``model`` with ``activations``.

    ``activations`` are those that a patch puts in place, by qualified name; all others are the model's own.
    A field may feed more than the MLPs (the mixers of a hybrid, a head), or a string that a forward reads.
    """
    built = _build(model, config, field, value)
    if not activations.keys() <= built.keys():
        return False
    ours = dict(model.named_modules())
    for name, module in built.items():
        mine = activations.get(name, ours.get(name))
        if mine is None:
            continue
        is_activation = isinstance(module, STOCK_ACTIVATIONS) or isinstance(mine, STOCK_ACTIVATIONS)
        if is_activation and type(module) is not type(mine):
            return False
        for attribute, text in vars(module).items():
            if isinstance(text, str) and text in ACT2FN and vars(mine).get(attribute) != text:
                return False
    return True


def _build(model: PreTrainedModel, config: PretrainedConfig, field: str, value: str) -> dict[str, nn.Module]:
    """Modules by name of a weightless model with one field changed; empty if it cannot be built."""
    config = copy.deepcopy(config)
    vars(config).pop(KEY, None)
    registered = KEY in ACT2FN
    try:
        ACT2FN[KEY] = UnpatchedActivation
        setattr(config, field, value)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return dict(type(model)(config).named_modules())
    except Exception:  # a field that accepts no other value is not the one
        return {}
    finally:
        if not registered:
            del ACT2FN[KEY]
