"""The transformers methods that ``import hf_sparse`` wraps, so that loading and saving know of a patch.

- ``post_init`` ends every construction: all auto classes, ``from_config``, direct calls, meta skeletons
  before the weights load. When the config carries an ``"hf_sparse"`` block, the sparse blocks are put in
  place first; a config without one passes straight through.
- ``_initialize_weights`` gives parameters that a checkpoint lacks their first values; those of ours have
  theirs from ``reset_parameters``.
- ``save_pretrained`` first brings the config in line with the modules, and is followed by the README's
  section on the model.
- ``_upload_modified_files`` ends every push to the Hub, after transformers has put its own README there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse.checkpoint_block import KEY
from hf_sparse.described import in_line
from hf_sparse.model_card import write_model_card
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
        original = getattr(PreTrainedModel, name)
        _originals[name] = vars(PreTrainedModel).get(name)
        setattr(PreTrainedModel, name, _wrapped(name, original, around))
    ACT2FN[KEY] = UnpatchedActivation


def uninstall() -> None:
    """Put transformers back as it was. Patched models go on working; loading one then fails loudly.

    What another tool has wrapped around our wrapper stays, and calls the original through it.
    """
    for name, original in _originals.items():
        if vars(getattr(PreTrainedModel, name)).get("_hf_sparse") != name:
            continue
        if original is None:
            delattr(PreTrainedModel, name)
        else:
            setattr(PreTrainedModel, name, original)
    if _originals:
        _originals.clear()
        del ACT2FN[KEY]


_originals: dict[str, Any] = {}
"""While installed, what ``PreTrainedModel`` itself had under each name; None if it inherited it."""


def _wrapped(name: str, original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # Signatures differ between versions of transformers: as little as possible is named here.
        call = functools.partial(original, self, *args, **kwargs)
        return around(call, self, *args, **kwargs) if _originals else call()

    vars(wrapper)["_hf_sparse"] = name
    return wrapper


def _post_init(call: Callable[[], Any], model: PreTrainedModel, *_: Any, **__: Any) -> Any:
    patch_from_config(model)
    return call()


def _initialize_weights(call: Callable[[], Any], model: PreTrainedModel, *args: Any, **_: Any) -> Any:
    module = args[0] if args else None
    if isinstance(module, ParameterLeaf) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
        vars(module)["_is_hf_initialized"] = True  # the model's own rules are for stock modules
    return call()


def _save_pretrained(
    call: Callable[[], Any],
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *_: Any,
    **__: Any,
) -> Any:
    with in_line(model):
        result = call()
        if is_main_process and os.path.isdir(save_directory):
            write_model_card(model, save_directory)
    return result


def _upload(
    call: Callable[[], Any],
    model: PreTrainedModel,
    working_dir: str | os.PathLike[str],
    *_: Any,
    **__: Any,
) -> Any:
    write_model_card(model, working_dir)
    return call()


_AROUND: dict[str, Callable[..., Any]] = {
    "post_init": _post_init,
    "_initialize_weights": _initialize_weights,
    "save_pretrained": _save_pretrained,
    "_upload_modified_files": _upload,
}
