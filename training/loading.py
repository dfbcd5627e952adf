"""The model of a recipe: pretrained, or from scratch."""

from __future__ import annotations

from typing import Any

import torch
from recipe import Recipe
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

_TASKS: dict[str, tuple[Any, Any, str]] = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "a causal language model"),
    "span_corruption": (
        AutoModelForSeq2SeqLM,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "an encoder-decoder for text, such as T5",
    ),
}


def load(recipe: Recipe) -> PreTrainedModel:
    """The model before the patch, in float32: as it was published, or with weights that the seed decides on.

    Raises:
        ValueError: it is no model for the task; or see :func:`sized_config`.

    """
    auto, mapping, kind = _TASKS[recipe.task]
    revision = recipe.revision or "main"
    config = sized_config(recipe.model, revision, recipe.model_config)
    if type(config) not in mapping:
        other = next((f"; task={task} takes it" for task in _TASKS if type(config) in _TASKS[task][1]), "")
        raise ValueError(
            f"task={recipe.task} trains {kind}, and model={recipe.model!r} is a {config.model_type}{other}."
        )
    if not recipe.from_scratch:
        return auto.from_pretrained(recipe.model, revision=revision, dtype=torch.float32)
    config.name_or_path = ""  # it has no base model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return auto.from_config(config, dtype=torch.float32)


def sized_config(model: str, revision: str, changes: dict[str, Any]) -> PretrainedConfig:
    """The config of ``model`` with ``changes``; what it derives from its other fields follows them.

    Raises:
        ValueError: a change is of no field of this config, or one that its class refuses.

    """
    config = AutoConfig.from_pretrained(model, revision=revision)
    if not changes:
        return config
    aliases = config.attribute_map
    known = sorted(name for name in config.to_dict() if not name.startswith("_"))
    if unknown := sorted(name for name in changes if aliases.get(name, name) not in known):
        raise ValueError(
            f"model_config has {', '.join(unknown)}, which {type(config).__name__} of {model!r} does not "
            f"have; it has {', '.join(known)}."
        )
    given, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    renamed = {aliases.get(name, name): value for name, value in changes.items()}
    return type(config).from_dict({**given, **renamed})
