"""patch, unpatch, inspect, set_mix: the model's MLP blocks exchanged in place, all or none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse import checkpoint_block
from hf_sparse.activations import build_activation, row_of
from hf_sparse.adapters import Block, find_blocks, require_blocks
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.kept import owners
from hf_sparse.checkpoint_block import Record
from hf_sparse.checks import shown
from hf_sparse.config import SparsityConfig
from hf_sparse.described import described
from hf_sparse.errors import PatchError
from hf_sparse.modules import KeptChange, SparseBlock, SparseExperts, SparseMLP, sparse_parts
from hf_sparse.patch_report import PatchReport
from hf_sparse.stock import (
    UnpatchedActivation,
    activation_field,
    refuse_missing_block,
    sets_activation,
    stock_name,
)


def patch(
    model: nn.Module, config: SparsityConfig | Mapping[str, Any] | str = "relu", **fields: Any
) -> PatchReport:
    """Replace the MLP blocks of ``model`` by sparse ones, in place.

    No weight is copied and no parameter or child is renamed. The change is written to ``model.config``, so
    ``save_pretrained``, ``push_to_hub`` and, after ``import hf_sparse``, ``from_pretrained`` keep it. A model
    that is patched already is patched anew, from its stock blocks.

    Args:
        model: a transformers model, also one wrapped by PEFT. Its config object is changed, too; another
            model built from the very same object should be given a copy.
        config: a :class:`SparsityConfig`, what its ``to_dict`` gives, or the name of an activation.
        **fields: fields of :class:`SparsityConfig` when ``config`` is a name, such as ``threshold=0.01``.

    Returns:
        what was changed; it prints as a summary.

    Raises:
        PatchError: nothing to patch, or this model cannot take this config. The model is as it was.
        ValueError: a field of the config is out of its range.

    """
    config = SparsityConfig.read(config, **fields)
    base = transformers_model(model)
    blocks, skipped = require_blocks(base)
    chosen = _choose(base, blocks, config)
    record = Record.of(config, len(blocks), *_stock_activation(base, blocks))
    new = _new_modules(blocks, chosen, config)
    name = stock_name(base, record, _parts(blocks, new))

    # Everything that can fail has been done; from here on there are only assignments.
    record.write(base.config, stock_name=name)
    _exchange(base, blocks, new)
    patched = [replace(block, module=base.get_submodule(block.name)) for block in chosen]
    return PatchReport(type(base).__name__, config, patched, skipped, record.activation, name)


def unpatch(model: nn.Module) -> PatchReport:
    """Undo :func:`patch`: the very stock modules come back, with their weights as they are now.

    Raises:
        PatchError: the model is not patched.

    """
    base = transformers_model(model)
    record = checkpoint_block.read(base.config)
    if record is None:
        raise PatchError(f"this {type(base).__name__} is not patched: its config has no hf_sparse block.")
    blocks, skipped = find_blocks(base)
    _exchange(base, blocks, _new_modules(blocks, [], record.config))
    record.erase(base.config)
    blocks = [replace(b, module=base.get_submodule(b.name)) for b in blocks]
    return PatchReport(type(base).__name__, None, blocks, skipped, record.activation)


def inspect(model: nn.Module) -> PatchReport:
    """What :func:`patch` would change, or, on a patched model, what is patched. Changes nothing.

    Raises:
        PatchError: the modules of a patched model were changed to something that no config can say.

    """
    base = transformers_model(model)
    blocks, skipped = find_blocks(base)
    record = checkpoint_block.read(base.config)
    record = None if record is None else described(base, record)
    if record is None:
        return PatchReport(type(base).__name__, None, blocks, skipped)
    blocks = [block for block in blocks if block.is_patched]
    value = getattr(base.config, record.field)
    name = None if value == checkpoint_block.KEY else value
    return PatchReport(type(base).__name__, record.config, blocks, skipped, record.activation, name)


def set_mix(model: nn.Module, k: float) -> None:
    """Set the share ``k`` of the new activation on every patched block (see ``SparsityConfig.mix``).

    A saved model keeps it. Meant to be called at every step of a finetune.

    Raises:
        PatchError: the model is not patched.
        ValueError: ``k`` is outside [0, 1].

    """
    base = transformers_model(model)
    record = checkpoint_block.read(base.config)
    if record is None:
        raise PatchError(f"set_mix needs a patched model; this {type(base).__name__} is not patched.")
    config = record.config.changed(activation=record.config.activation.with_mix(k))
    if config == record.config:
        return
    for part in sparse_parts(base):
        part.set_mix(config.activation.mix)
    record = replace(record, config=config)
    blocks, _ = find_blocks(base)
    parts = {name: part for block in blocks for name, part in block.parts.items()}
    record.write(base.config, stock_name=stock_name(base, record, parts))


def patch_from_config(model: PreTrainedModel) -> None:
    """Patch a model under construction from the block in its config; nothing if it has none.

    Runs for inner models before the outer one, which finds their blocks patched. An inner model may hold only
    some of the blocks: if the config tells them apart by their number, they are left to the outer model.

    Raises:
        ValueError: the block is malformed, or does not fit the model or the rest of its config.

    """
    record = checkpoint_block.read(model.config)
    if record is None:
        refuse_missing_block(model.config)
        return
    with checkpoint_block.refusing():
        record.agree(model.config)
        blocks, _ = find_blocks(model)
        todo = [block for block in blocks if not block.is_patched]
        is_inner = model.base_model is model
        if not record.config.uniform:
            if is_inner and len(blocks) != record.blocks:
                return
            if record.blocks != len(blocks):
                raise ValueError(
                    f"blocks={record.blocks} is not the number of MLP blocks of this {type(model).__name__}, "
                    f"which is {len(blocks)}; load it with all its layers."
                )
            if len(todo) < len(blocks):
                _put_back(model, (), record.activation)
                return
        if not blocks and not is_inner:
            require_blocks(model)
        if not todo:
            if blocks:  # an inner model has patched them; a head may have the activation, too
                _put_back(model, (), record.activation)
            return
        chosen = _choose(model, todo, record.config)
        made = {f"{block.name}.{block.roles.act}": block.activation for block in todo}
        if not sets_activation(model, record.field, made):
            raise ValueError(
                f"stock.field={record.field!r} does not set the activation of the MLP blocks of "
                f"{type(model).__name__}; patch the original model again, and save it."
            )
        _put_back(model, todo, record.activation)
        _exchange(model, todo, _new_modules(todo, chosen, record.config))


def prepare(model: nn.Module, *, certify: bool = False) -> None:
    """Get a patched model ready to skip; otherwise the first call that skips does it, block by block.

    Down projections are stored neuron-major: same values and shape, other strides. That lasts until somebody
    gets to the weights of the model (to train, save, move, list or change them), and is done again by the
    next call that skips. A compiled graph can do neither: call this last before ``torch.compile``, else the
    graph runs dense on the stock layout, and without certificates.

    Args:
        model: a patched model.
        certify: decode single sequences without reading most of the projection that decides which neurons are
            active. A certificate of it, one byte per weight (of the gate, or of the up projection of a plain
            MLP) and 12 per neuron, proves most silent neurons silent. The result is the same, bit for bit. It
            pays where few neurons are active; several tokens in a call, and MLPs whose module stays (in the
            report, layers and not MLPs: OPT, BERT), are computed without it. It is used while nobody but the
            model holds that projection, so that no change of it goes unnoticed: with an optimizer or a list
            of its parameters at hand, decoding goes on without. False ends its use.

    Raises:
        PatchError: the model is not patched, or has an activation that is never exactly zero.

    Warns:
        UserWarning: blocks cannot skip while something else holds their weights.

    """
    base = transformers_model(model)
    sparse = sparse_parts(base)
    if not sparse:
        raise PatchError(f"prepare needs a patched model; this {type(base).__name__} is not patched.")
    if certify and all(row_of(part.activation) is None for part in sparse):
        raise PatchError(
            f"certify=True needs activations that can be exactly zero; the blocks of this "
            f"{type(base).__name__} have {type(sparse[0].activation).__name__}. Patch with another one "
            'first, such as "relu".'
        )
    for part in sparse:
        part.prepare(certify=certify)
    if held := sum(part.is_held for part in sparse):
        warnings.warn(
            f"{held} of {len(sparse)} MLP blocks run dense for now: something holds their down projections "
            "(an optimizer, a list of parameters, a kept state dict), or these lie in memory that torch did "
            "not allocate (an array, an unpickled model; copy.deepcopy(model) has its own).",
            stacklevel=2,
        )


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that ``model`` is, or that PEFT wrapped.

    Raises:
        PatchError: there is none.

    """
    unwrap = getattr(model, "get_base_model", None)  # PEFT
    base = unwrap() if callable(unwrap) else model
    if not isinstance(base, PreTrainedModel):
        raise PatchError(
            f"expected a transformers model (PreTrainedModel, or one wrapped by PEFT), not {type(model)}; "
            "pass the model itself, before it is wrapped by DDP, FSDP or torch.compile."
        )
    return base


def _choose(model: PreTrainedModel, blocks: list[Block], config: SparsityConfig) -> list[Block]:
    """The blocks that ``config`` means.

    Raises:
        PatchError: an index is out of range, or a block cannot take the config.

    """
    indices = range(len(blocks)) if config.layers is None else config.layers
    if max(indices) >= len(blocks):
        raise PatchError(
            f"layers={shown(config.layers)} names block {max(indices)}, but {type(model).__name__} has "
            f"blocks 0 to {len(blocks) - 1}."
        )
    for name, part in config.parts.items():
        if part.blocks not in (None, len(indices)):
            raise PatchError(
                f"{name} has values for {part.blocks} blocks, but {len(indices)} are to be patched; give one "
                "value, or one per patched block."
            )
    chosen = [blocks[i] for i in indices]
    for block in chosen:
        for part in config.parts.values():
            part.check(block)
        if block.stays and config.others:
            raise PatchError(
                f"{config.others[0][0]} belongs into an MLP block of our own, but {block.name} stays a "
                f"{block.stock_class.__name__} when it is patched; leave {config.others[0][0]} out."
            )
        if by := block.replaced_forward:
            raise PatchError(
                f"the forward of {block.name} was replaced by {by} (Liger's use_liger_kernel does so), which "
                "would undo the patch; turn that off for the MLP."
            )
    return chosen


def _new_modules(
    blocks: Sequence[Block], chosen: Sequence[Block], config: SparsityConfig
) -> dict[str, nn.Module | KeptChange]:
    """By name, what comes in the place of ``blocks`` and their spares, or is put into them.

    Of those ``chosen``, sparse blocks; of the others, stock ones.
    """
    new: dict[str, nn.Module | KeptChange] = {
        copy.name: KeptChange.to_stock(copy) if copy.stays else _stock_block(copy)
        for block in blocks
        for copy in (block, *block.spares)
    }
    for index, block in enumerate(chosen):
        for copy in (block, *block.spares):  # the other adapters' copies, for when they are switched to
            new[copy.name] = _sparse_block(copy, config, index)
    return new


def _sparse_block(block: Block, config: SparsityConfig, index: int) -> SparseBlock | KeptChange:
    activation = build_activation(config.activation, index, block.original_activation)
    if block.stays:
        return KeptChange.to_sparse(block, activation, config.activation.mix)
    kind: type[SparseBlock] = SparseExperts if isinstance(block.roles, Experts) else SparseMLP
    sparse = kind(_stock_block(block), block.roles, activation, relu_up=config.activation.relu_up)
    sparse.set_mix(config.activation.mix)
    for _, part in config.others:
        part.build(sparse, index)
    return sparse


def _stock_block(block: Block) -> nn.Module:
    return block.module.restore() if isinstance(block.module, SparseBlock) else block.module


def _parts(blocks: Sequence[Block], new: Mapping[str, nn.Module | KeptChange]) -> dict[str, nn.Module]:
    """By their places, the modules that tell a model in which ``blocks`` are exchanged from another one."""
    parts: dict[str, nn.Module] = {}
    for block in blocks:
        one = new[block.name]
        if isinstance(one, KeptChange):
            parts[f"{block.place}.{block.roles.act}"] = one.activation
        else:
            parts[block.place] = one
    return parts


def _stock_activation(model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[str, str]:
    """The config field that names the activation, and its stock value."""
    record = checkpoint_block.read(model.config)
    if record is not None:
        return record.field, record.activation
    names = [f"{block.place}.{block.roles.act}" for block in blocks]
    field = activation_field(model, names)
    if field is None:
        raise PatchError(
            f"no field of {type(model.config).__name__} sets the activation of the MLP blocks, so a saved "
            "model could not say that it is patched. If the config is a composite, patch the language model "
            f"inside; otherwise please report the model type {model.config.model_type!r}."
        )
    return field, getattr(model.config, field)


def _put_back(model: nn.Module, blocks: Sequence[Block], activation: str) -> None:
    """Stock activations where the config named the new one, in ``blocks`` and in whatever else it feeds."""
    for block in blocks:
        for owner, name in owners(block.module, block.roles.act):
            owner._modules[name] = ACT2FN[activation]
    for module in model.modules():  # such as a mixer
        for name, child in module._modules.items():
            if isinstance(child, UnpatchedActivation):
                module._modules[name] = ACT2FN[activation]
        for name, value in vars(module).items():
            if isinstance(value, str) and value == checkpoint_block.KEY:
                vars(module)[name] = activation


def _exchange(model: nn.Module, blocks: Sequence[Block], new: Mapping[str, nn.Module | KeptChange]) -> None:
    """Put ``new[name]`` wherever a block or spare of that name is; it may be shared by several owners."""
    exchanged: dict[int, nn.Module] = {}
    for copy in (copy for block in blocks for copy in (block, *block.spares)):
        one = new[copy.name]
        if isinstance(one, KeptChange):
            one.make()
        else:
            exchanged[id(copy.module)] = one
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is not None and id(child) in exchanged:
                owner._modules[name] = exchanged[id(child)]
