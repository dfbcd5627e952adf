"""The one transformers method that ``import hf_sparse`` wraps, so that ``from_pretrained`` patches.

``PreTrainedModel.post_init`` ends every construction: all auto classes, ``from_config``, direct calls, meta
skeletons before the weights load. When the config carries an ``"hf_sparse"`` block, the wrapped method first
puts the sparse blocks in place; a config without one passes straight through.
"""

from __future__ import annotations

import functools

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse.checkpoint_block import KEY
from hf_sparse.patching import patch_from_config
from hf_sparse.stock import UnpatchedActivation


def install() -> None:
    """Make ``from_pretrained`` rebuild patched models; ``import hf_sparse`` calls this."""
    original = PreTrainedModel.post_init
    if hasattr(original, "_hf_sparse_original"):
        return

    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        patch_from_config(self)
        original(self)

    post_init._hf_sparse_original = original  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    ACT2FN[KEY] = UnpatchedActivation


def uninstall() -> None:
    """Put transformers back as it was. Patched models go on working; loading one then fails loudly."""
    original = getattr(PreTrainedModel.post_init, "_hf_sparse_original", None)
    if original is not None:
        PreTrainedModel.post_init = original  # type: ignore[method-assign]
        del ACT2FN[KEY]
