"""The decode step of ``generate()``, compiled with a static cache, by the means of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from hf_sparse.adapters.walk import modules_of
from hf_sparse.errors import PatchError
from hf_sparse.modules import SparseExperts
from hf_sparse.modules.sparse_block import hooks_on_all_modules
from hf_sparse.packed_attention import pack_attention, stock_attention

BACKEND = "inductor"
OPTIONS = {"cpp.threads": 1}
"""On a CPU. Between two products a step works on a few thousand numbers: to wake threads takes longer."""
_FORMER = "_hf_sparse_former_generation"
_FIELDS = ("cache_implementation", "compile_config")


class CompiledStep:
    """What ``generate()`` calls for every token after the prompt.

    transformers would keep a compiled method of ``model`` there. In a copy of the model that is still the one
    of the original, and runs on its weights.
    """

    def __init__(self, model: PreTrainedModel, config: CompileConfig) -> None:
        self._model, self._config = model, config
        self._call: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if hooks_on_all_modules():
            return self._model(*args, **kwargs)
        if self._call is None:
            self._call = torch.compile(self._model.__call__, **self._config.to_dict())
        # Hooks that come later count as well: nobody who calls generate() sees that they have compiled.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return self._call(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which compile anew."""
        return {**vars(self), "_call": None}


def compile_step(model: PreTrainedModel) -> None:
    """Have ``model.generate`` compile its decode step when it first takes one.

    Raises:
        PatchError: transformers cannot compile this model as one graph.

    """
    own: Any = getattr(model, "generation_config", None)
    if own is None or not model.can_generate() or not getattr(model, "_can_compile_fullgraph", False):
        raise PatchError(
            f"compile=True is for models that generate text with a static cache, and transformers has none "
            f"for {type(model).__name__}; leave compile out."
        )
    stock_step(model)
    former = tuple(getattr(own, name) for name in _FIELDS)
    experts = any(isinstance(module, SparseExperts) for module in modules_of(model))
    config = CompileConfig(fullgraph=not experts, backend=BACKEND)
    if model.device.type == "cpu":
        config.mode, config.options = None, OPTIONS  # type: ignore[assignment]
        pack_attention(model)
    config._compile_all_devices = True  # type: ignore[assignment]  # else never on a CPU
    own.cache_implementation, own.compile_config = "static", config
    vars(model)[_FORMER] = own, former, ("static", config)
    vars(model).update(_compiled_call=CompiledStep(model, config), _last_compile_config=config)


def stock_step(model: PreTrainedModel) -> None:
    """Undo :func:`compile_step`."""
    _put_back(model)
    stock_attention(model)
    if vars(model).pop(_FORMER, None) is not None:
        for name in ("_compiled_call", "_last_compile_config"):
            vars(model).pop(name, None)


@contextmanager
def stock_generation(model: PreTrainedModel) -> Iterator[None]:
    """While in here, fields of the generation config are what they were, but for those changed since."""
    changed = _put_back(model)
    try:
        yield
    finally:
        for name, value in changed.items():
            setattr(model.generation_config, name, value)


def _put_back(model: PreTrainedModel) -> dict[str, Any]:
    """The fields that were ours until now."""
    changed: dict[str, Any] = {}
    own, former, ours = vars(model).get(_FORMER, (None, (), ()))
    if own is not None and own is model.generation_config:
        for name, before, now in zip(_FIELDS, former, ours, strict=True):
            if getattr(own, name) == now:
                setattr(own, name, before)
                changed[name] = now
    return changed
