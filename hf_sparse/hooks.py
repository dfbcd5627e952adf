"""The transformers methods that ``import hf_sparse`` wraps, so that loading and saving know of a patch.

- ``PretrainedConfig._dict_from_json_file`` reads a ``config.json``. transformers walks what it gives
  recursively, so a block that nests without end is refused there.
- ``PreTrainedModel.post_init`` ends every construction: all auto classes, ``from_config``, direct calls,
  meta skeletons before the weights load. When the config carries an ``"hf_sparse"`` block, the sparse blocks
  are put in place first; a config without one passes straight through.
- ``HfQuantizer.preprocess_model`` puts quantised layers into such a skeleton. Some quantizers look for the
  very class ``nn.Linear``, so a down projection of ours is one meanwhile.
- ``_initialize_weights`` gives parameters that a checkpoint lacks their first values; those of ours have
  theirs from ``reset_parameters``.
- ``save_pretrained`` first brings the config in line with the modules, and is followed by the README's
  section on the model.
- ``generate`` is where a prepared model has its attention packed, and decodes greedily without all of its
  output layer.
- ``_upload_modified_files`` ends every push to the Hub, after transformers has put its own README there.

Beside them it adds two names that checkpoints use to be refused elsewhere, an activation and a fusion.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.quantizers import HfQuantizer

from hf_sparse import greedy_decoding
from hf_sparse.checkpoint_block import KEY, refusing
from hf_sparse.checks import bounded
from hf_sparse.compiled_step import compiled_steps, stock_generation
from hf_sparse.described import in_line
from hf_sparse.model_card import write_model_card
from hf_sparse.modules import ParameterLeaf, SparseBlock, stock_downs
from hf_sparse.packed_attention import generating
from hf_sparse.rebuilding import patch_from_config
from hf_sparse.stock import UnpatchedActivation


def install() -> None:
    """Make ``from_pretrained`` rebuild patched models, and ``save_pretrained`` save what they compute.

    ``import hf_sparse`` calls this.
    """
    if _originals:
        return
    for name, (owner, around) in _AROUND.items():
        original = getattr(owner, name, None)
        if original is None:
            continue  # a private one may go with another version of transformers
        _originals[name] = vars(owner).get(name)
        setattr(owner, name, _wrapped(name, vars(owner).get(name, original), around))
    ACT2FN[KEY] = UnpatchedActivation
    _fusions()[KEY] = _NoFusion()


def uninstall() -> None:
    """Put transformers back as it was. Patched models go on working; loading one then fails loudly.

    What another tool has wrapped around our wrapper stays, and calls the original through it.
    """
    for name, original in _originals.items():
        owner, _ = _AROUND[name]
        if vars(vars(owner)[name]).get("_hf_sparse") != name:
            continue
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    if _originals:
        _originals.clear()
        del ACT2FN[KEY]
        _fusions().pop(KEY, None)


class _NoFusion:
    """What transformers makes of the fusion that patched models without an activation field name: nothing."""

    target_modules_patterns = ()

    def get_empty_log(self, model_name: str) -> str:
        return f"{model_name} is patched by hf_sparse, which fuses nothing."

    def is_fusable(self, module: nn.Module) -> bool:
        return False


def _fusions() -> dict[str, Any]:
    try:
        from transformers.fusion_mapping import _FUSION_REGISTRY
    except ImportError:  # transformers 4 has no fusions, and loads configs that name some
        return {}
    registry: dict[str, Any] = _FUSION_REGISTRY
    return registry


_originals: dict[str, Any] = {}
"""While installed, what each owner itself had under each name; None if it inherited it."""


def _wrapped(name: str, original: Any, around: Callable[..., Any]) -> Any:
    function = getattr(original, "__func__", original)  # of a class method

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Signatures differ between versions of transformers: as little as possible is named here.
        call = functools.partial(function, self, *args, **kwargs)
        return around(call, self, *args, **kwargs) if _originals else call()

    wrapped = wrapper if function is original else classmethod(wrapper)
    vars(wrapped)["_hf_sparse"] = name
    return wrapped


def _dict_from_json_file(call: Callable[[], Any], _: type, *args: Any, **__: Any) -> Any:
    try:
        values = call()
    except RecursionError:
        if args and KEY in Path(args[0]).read_text(encoding="utf-8"):
            raise ValueError(
                f'{args[0]} nests too deeply to be read; a "{KEY}" block has a few levels. Do not trust it.'
            ) from None
        raise
    todo = [values]
    while todo:  # a composite has a block in the config of a part
        one = todo.pop()
        if not isinstance(one, Mapping):
            continue
        if KEY in one:
            with refusing():
                bounded(one[KEY])
        todo += [value for key, value in one.items() if key != KEY]
    return values


def _post_init(call: Callable[[], Any], model: PreTrainedModel, *_: Any, **__: Any) -> Any:
    patch_from_config(model)
    return call()


def _preprocess_model(call: Callable[[], Any], _: HfQuantizer, model: nn.Module, *__: Any, **___: Any) -> Any:
    with stock_downs(model):
        return call()


def _initialize_weights(
    call: functools.partial[Any], model: PreTrainedModel, *args: Any, **kwargs: Any
) -> Any:
    module = args[0] if args else None
    if isinstance(module, ParameterLeaf) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
        vars(module)["_is_hf_initialized"] = True  # the model's own rules are for stock modules
    if isinstance(module, SparseBlock):
        # Rules go by the class of a module. The stock block holds the same parameters and layers.
        result = call.func(model, module.stock, *args[1:], **kwargs)
        vars(module)["_is_hf_initialized"] = True
        return result
    return call()


def _save_pretrained(
    call: Callable[[], Any],
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *_: Any,
    **__: Any,
) -> Any:
    with in_line(model), stock_generation(model):
        result = call()
        if is_main_process and os.path.isdir(save_directory):
            write_model_card(model, save_directory)
    return result


def _generate(call: Callable[[], Any], model: GenerationMixin, *_: Any, **__: Any) -> Any:
    with generating(model), compiled_steps(model):
        return greedy_decoding.generate(call, model)


def _upload(
    call: Callable[[], Any],
    model: PreTrainedModel,
    working_dir: str | os.PathLike[str],
    *_: Any,
    **__: Any,
) -> Any:
    write_model_card(model, working_dir)
    return call()


_AROUND: dict[str, tuple[type, Callable[..., Any]]] = {
    "_dict_from_json_file": (PretrainedConfig, _dict_from_json_file),
    "post_init": (PreTrainedModel, _post_init),
    "preprocess_model": (HfQuantizer, _preprocess_model),
    "_initialize_weights": (PreTrainedModel, _initialize_weights),
    "save_pretrained": (PreTrainedModel, _save_pretrained),
    "_upload_modified_files": (PreTrainedModel, _upload),
    "generate": (GenerationMixin, _generate),
}
