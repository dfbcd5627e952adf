"""Models in models: the parts of a composite, each with a config of its own, and which is the language part.

A multimodal model, or an encoder-decoder of two models, holds others, and its config theirs
(``text_config``, ``vision_config``, ``decoder``, ...). Such a config names the activation of its part, and
the part is built from it, alone or in the composite. So the ``"hf_sparse"`` block of the part belongs there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_sparse.adapters import Block, Skipped, find_blocks
from hf_sparse.checkpoint_block import has, read, refuse_elsewhere, refused_elsewhere
from hf_sparse.errors import PatchError

LANGUAGE = "text"
"""Stands for the language part, whatever it is called in the config."""

Path = tuple[str, ...]
"""Fields that lead from the config of a model to one in it; () is its own."""


@dataclass(frozen=True)
class Part:
    """What is built from one config: all of a model but the parts in it that have their own."""

    name: str
    path: Path
    config: PretrainedConfig
    models: Sequence[tuple[str, PreTrainedModel]]
    """With their names in the whole model. Mostly one; a few composites build two from one config."""

    def blocks(self, index: int = 0) -> tuple[list[Block], list[Skipped]]:
        """What :func:`own_blocks` finds in one of the models, by its name in the whole one."""
        prefix, model = self.models[index]
        blocks, skipped = own_blocks(model)
        if not prefix:
            return blocks, skipped
        return [_renamed(block, prefix) for block in blocks], [
            replace(one, name=f"{prefix}.{one.name}") for one in skipped
        ]

    @property
    def all_blocks(self) -> list[Block]:
        """Those of all its models."""
        return [block for index in range(len(self.models)) for block in self.blocks(index)[0]]


def nested(config: PretrainedConfig) -> dict[Path, PretrainedConfig]:
    """``config`` and those in it, each once, by the fields that lead there."""
    found: dict[Path, PretrainedConfig] = {}
    todo: list[tuple[Path, PretrainedConfig]] = [((), config)]
    while todo:
        path, one = todo.pop(0)
        if all(one is not other for other in found.values()):
            found[path] = one
            todo += [((*path, k), v) for k, v in vars(one).items() if isinstance(v, PretrainedConfig)]
    return found


def parts_of(model: PreTrainedModel) -> list[Part]:
    """The parts of ``model``: first what is built from its own config, then in the order of their modules."""
    configs = nested(model.config)
    owners: dict[Path, list[tuple[str, PreTrainedModel]]] = {(): [("", model)]}
    for name, module, path in _inner(model, configs):
        owners.setdefault(path, []).append((name, module))
    language = _language(model.config, configs, owners)
    return [Part(_name(path, language), path, configs[path], models) for path, models in owners.items()]


def find_part(model: PreTrainedModel, name: str) -> Part:
    """The part of ``model`` that is called ``name``.

    Raises:
        PatchError: there is none; the message names those that there are.

    """
    parts = parts_of(model)
    language = _language(model.config, nested(model.config), [part.path for part in parts])
    for part in parts:
        if part.name == name or (name == LANGUAGE and part.path == language):
            return part
    raise PatchError(f"part={name!r} is no part of this {type(model).__name__}. {listed(parts)}")


def listed(parts: Sequence[Part]) -> str:
    """A sentence for errors: the parts with blocks that can be patched."""
    counts = {part.name: len(part.all_blocks) for part in parts}
    found = ", ".join(f"{name!r} ({count} MLP blocks)" for name, count in counts.items() if count)
    return f"Parts with MLP blocks of a known shape: {found or 'none'}."


def own_blocks(model: nn.Module, without: Collection[nn.Module] = ()) -> tuple[list[Block], list[Skipped]]:
    """What :func:`find_blocks` finds in ``model`` outside of the parts that have a config of their own."""
    blocks, skipped = find_blocks(model, without)
    if not isinstance(model, PreTrainedModel):
        return blocks, skipped
    others = tuple(f"{name}." for name, _, path in _inner(model, nested(model.config)) if path)
    return (
        [block for block in blocks if not block.name.startswith(others)],
        [one for one in skipped if not f"{one.name}.".startswith(others)],
    )


def pass_on_refusal(config: PretrainedConfig) -> None:
    """Let ``config`` refuse transformers alone if one in it does: only the outermost is asked."""
    inner = [one for path, one in nested(config).items() if path]
    if any(map(refused_elsewhere, inner)):
        refuse_elsewhere(config, True)
    elif not (has(config) and (record := read(config)) is not None and record.field is None):
        refuse_elsewhere(config, False)


def inner_models(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The models in ``model`` that have a config of their own in its config, with their names."""
    return [(name, module) for name, module, _ in _inner(model, nested(model.config))]


def _inner(
    model: PreTrainedModel, configs: dict[Path, PretrainedConfig]
) -> list[tuple[str, PreTrainedModel, Path]]:
    """The outermost model of each config in that of ``model``; parts may be in parts."""
    if len(configs) == 1:
        return []
    paths = {id(config): path for path, config in configs.items()}
    found: list[tuple[str, PreTrainedModel, Path]] = []
    for name, module in model.named_modules():
        path = paths.get(id(module.config)) if isinstance(module, PreTrainedModel) else ()
        if not path:  # no model, one of the own config, or of a copy that nobody saves
            continue
        if not any(path == other and name.startswith(f"{outer}.") for outer, _, other in found):
            found.append((name, module, path))
    return found


def _language(
    config: PretrainedConfig,
    configs: dict[Path, PretrainedConfig],
    paths: Collection[Path],
) -> Path | None:
    """Where the config of the language part is; None if transformers cannot tell."""
    if len(configs) == 1:
        return ()
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # several
        return None
    return next((path for path, one in configs.items() if one is text and path in paths), ())


def _name(path: Path, language: Path | None) -> str:
    if path:
        return ".".join(field.removesuffix("_config") for field in path)
    return LANGUAGE if language == () else "model"


def _renamed(block: Block, prefix: str) -> Block:
    spares = tuple(_renamed(spare, prefix) for spare in block.spares)
    return replace(block, name=f"{prefix}.{block.name}", spares=spares)
