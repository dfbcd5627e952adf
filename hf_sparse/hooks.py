"""The transformers methods that ``import hf_sparse`` wraps, so that loading and saving know of a patch.

``PreTrainedModel.post_init`` ends every construction: all auto classes, ``from_config``, direct calls, meta
skeletons before the weights load. When the config carries an ``"hf_sparse"`` block, the wrapped method first
puts the sparse blocks in place; a config without one passes straight through.
``PreTrainedModel._initialize_weights`` gives parameters that a checkpoint lacks their first values; those of
ours have theirs from ``reset_parameters``.
``PreTrainedModel.save_pretrained`` first brings the config in line with the modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse.checkpoint_block import KEY
from hf_sparse.described import bring_in_line
from hf_sparse.modules import ParameterLeaf
from hf_sparse.patching import patch_from_config
from hf_sparse.stock import UnpatchedActivation


def install() -> None:
    """Make ``from_pretrained`` rebuild patched models, and ``save_pretrained`` save what they compute.

    ``import hf_sparse`` calls this.
    """
    if _originals:
        return
    for name, before in _BEFORE.items():
        _originals[name] = getattr(PreTrainedModel, name)
        setattr(PreTrainedModel, name, _wrapped(name, before))
    ACT2FN[KEY] = UnpatchedActivation


def uninstall() -> None:
    """Put transformers back as it was. Patched models go on working; loading one then fails loudly.

    What another tool has wrapped around our wrapper stays, and calls the original through it.
    """
    for name, original in _originals.items():
        if getattr(getattr(PreTrainedModel, name), "_hf_sparse", None) == name:
            setattr(PreTrainedModel, name, original)
    if _originals:
        _originals.clear()
        del ACT2FN[KEY]


_originals: dict[str, Callable[..., Any]] = {}


def _wrapped(name: str, before: Callable[..., None]) -> Callable[..., Any]:
    original = _originals[name]

    @functools.wraps(original)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if _originals:
            before(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    vars(wrapper)["_hf_sparse"] = name
    return wrapper


def _before_post_init(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    patch_from_config(model)


def _before_initialize_weights(model: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    if isinstance(module, ParameterLeaf) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
        module._is_hf_initialized = True  # type: ignore[assignment]  # the model's own rules are for stock modules


def _before_save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    bring_in_line(model)


_BEFORE: dict[str, Callable[..., None]] = {
    "post_init": _before_post_init,
    "_initialize_weights": _before_initialize_weights,
    "save_pretrained": _before_save_pretrained,
}
