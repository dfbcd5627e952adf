"""The transformers methods that ``import hf_sparse`` wraps: patched models load, and are saved, as such.

- ``post_init`` ends every construction: all auto classes, ``from_config``, direct calls, meta skeletons
  before the weights load. When the config carries an ``"hf_sparse"`` block, the sparse blocks are put in
  place first; a config without one passes straight through.
- ``save_pretrained`` is followed by the README's section on the model.
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
from hf_sparse.model_card import write_model_card
from hf_sparse.patching import patch_from_config
from hf_sparse.stock import UnpatchedActivation


def install() -> None:
    """Make ``from_pretrained`` rebuild patched models; ``import hf_sparse`` calls this."""
    if hasattr(PreTrainedModel.post_init, "_hf_sparse_original"):
        return
    for name, wrapper in _WRAPPERS.items():
        original = getattr(PreTrainedModel, name)
        wrapped = _wrapped(original, wrapper)
        wrapped._hf_sparse_original = vars(PreTrainedModel).get(name)  # None: inherited
        setattr(PreTrainedModel, name, wrapped)
    ACT2FN[KEY] = UnpatchedActivation


def uninstall() -> None:
    """Put transformers back as it was. Patched models go on working; loading one then fails loudly."""
    if not hasattr(PreTrainedModel.post_init, "_hf_sparse_original"):
        return
    for name in _WRAPPERS:
        original = vars(PreTrainedModel)[name]._hf_sparse_original
        if original is None:
            delattr(PreTrainedModel, name)
        else:
            setattr(PreTrainedModel, name, original)
    del ACT2FN[KEY]


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    return method


def _post_init(original: Callable[..., None], self: PreTrainedModel) -> None:
    patch_from_config(self)
    original(self)


def _save_pretrained(
    original: Callable[..., None],
    self: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    original(self, save_directory, is_main_process, *args, **kwargs)
    if is_main_process and os.path.isdir(save_directory):
        write_model_card(self, save_directory)


def _upload(
    original: Callable[..., Any],
    self: PreTrainedModel,
    working_dir: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    write_model_card(self, working_dir)
    return original(self, working_dir, *args, **kwargs)


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "post_init": _post_init,
    "save_pretrained": _save_pretrained,
    "_upload_modified_files": _upload,
}
