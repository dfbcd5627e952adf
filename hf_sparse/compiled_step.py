"""The decode step of ``generate()``, compiled with a static cache, by the means of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from hf_sparse.errors import PatchError

BACKEND = "inductor"
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
        if self._call is None:
            self._call = torch.compile(self._model.__call__, **self._config.to_dict())
        return self._call(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which compile anew."""
        return {**vars(self), "_call": None}


def compile_step(model: PreTrainedModel) -> None:
    """Have ``model.generate`` compile its decode step when it first takes one.

    Raises:
        PatchError: transformers cannot compile this model as one graph.

    """
    if not model.can_generate() or not getattr(model, "_can_compile_fullgraph", False):
        raise PatchError(
            f"compile=True is for models that generate text with a static cache, and transformers has none "
            f"for {type(model).__name__}; leave compile out."
        )
    own: Any = model.generation_config
    if _FORMER not in vars(model):
        vars(model)[_FORMER] = tuple(getattr(own, name) for name in _FIELDS)
    config = CompileConfig(
        fullgraph=True, backend=BACKEND, mode="default" if model.device.type == "cpu" else "reduce-overhead"
    )
    config._compile_all_devices = True  # type: ignore[assignment]  # else never on a CPU
    own.cache_implementation, own.compile_config = "static", config
    vars(model).update(_compiled_call=CompiledStep(model, config), _last_compile_config=config)


def stock_step(model: PreTrainedModel) -> None:
    """Undo :func:`compile_step`."""
    if (former := vars(model).pop(_FORMER, None)) is not None:
        for name in ("_compiled_call", "_last_compile_config"):
            vars(model).pop(name, None)
        _restore(model, former)


def saved_with_stock_cache(model: PreTrainedModel, save: Any) -> Any:
    """What ``save`` returns, called while the generation config says of the cache what it did before."""
    former, own = vars(model).get(_FORMER), model.generation_config
    if former is None or own is None:
        return save()
    now = tuple(getattr(own, name) for name in _FIELDS)
    _restore(model, former)
    try:
        return save()
    finally:
        _restore(model, now)


def _restore(model: PreTrainedModel, values: tuple[Any, ...]) -> None:
    for name, value in zip(_FIELDS, values, strict=True):
        setattr(model.generation_config, name, value)
