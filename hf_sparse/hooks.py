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

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse.checkpoint_block import KEY
from hf_sparse.described import in_line
from hf_sparse.modules import ParameterLeaf
from hf_sparse.patching import patch_from_config
from hf_sparse.stock import UnpatchedActivation


def install() -> None:
    """Make ``from_pretrained`` rebuild patched models, and ``save_pretrained`` save what they compute.

    ``import hf_sparse`` calls this.
    """
    if _originals:
        return
    for name, around in _AROUND.items():
        original = _originals[name] = getattr(PreTrainedModel, name)
        setattr(PreTrainedModel, name, _wrapped(name, original, around))
    ACT2FN[KEY] = UnpatchedActivation


def uninstall() -> None:
    """Put transformers back as it was. Patched models go on working; loading one then fails loudly.

    What another tool has wrapped around our wrapper stays, and calls the original through it.
    """
    for name, original in _originals.items():
        if vars(getattr(PreTrainedModel, name)).get("_hf_sparse") == name:
            setattr(PreTrainedModel, name, original)
    if _originals:
        _originals.clear()
        del ACT2FN[KEY]


_originals: dict[str, Callable[..., Any]] = {}
"""While installed, the methods of transformers by name."""


def _wrapped(name: str, original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # Signatures differ between versions of transformers: nothing is named here.
        call = functools.partial(original, self, *args, **kwargs)
        return around(call, self, *args) if _originals else call()

    vars(wrapper)["_hf_sparse"] = name
    return wrapper


def _post_init(call: Callable[[], Any], model: PreTrainedModel, *_: Any) -> Any:
    patch_from_config(model)
    return call()


def _initialize_weights(call: Callable[[], Any], model: PreTrainedModel, *args: Any) -> Any:
    module = args[0] if args else None
    if isinstance(module, ParameterLeaf) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
        vars(module)["_is_hf_initialized"] = True  # the model's own rules are for stock modules
    return call()


def _save_pretrained(call: Callable[[], Any], model: PreTrainedModel, *_: Any) -> Any:
    with in_line(model):
        return call()


_AROUND: dict[str, Callable[..., Any]] = {
    "post_init": _post_init,
    "_initialize_weights": _initialize_weights,
    "save_pretrained": _save_pretrained,
}
