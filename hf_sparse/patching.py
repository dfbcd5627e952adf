"""patch, unpatch, inspect, set_mix: the model's MLP blocks exchanged in place, all or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse import checkpoint_block
from hf_sparse.activations import build_activation, is_stock, relu_up, row_of
from hf_sparse.adapters import Block, find_blocks, require_blocks
from hf_sparse.checkpoint_block import Record
from hf_sparse.config import ACTIVATIONS, SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.modules import SparseGatedMLP, SparseMLP, SparsePlainMLP
from hf_sparse.patch_report import PatchReport
from hf_sparse.stock import UnpatchedActivation, activation_field, builds_same


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
    config = _as_config(config, fields)
    base = transformers_model(model)
    blocks, skipped = require_blocks(base)
    chosen = _choose(base, blocks, config)
    field, original = _stock_activation(base, blocks)
    new: dict[str, nn.Module] = {copy.name: _stock_block(copy) for b in blocks for copy in (b, *b.spares)}
    for index, block in enumerate(chosen):
        for copy in (block, *block.spares):  # the other adapters' copies, for when they are switched to
            new[copy.name] = _sparse_block(copy, config, index)
    activations = {f"{b.place}.{b.roles.act}": new[b.name].get_submodule(b.roles.act) for b in blocks}
    stock_name = _stock_name(base, config, field, original, activations)

    # Everything that can fail has been done; from here on there are only assignments.
    Record(config, len(blocks), field, original).write(base.config, stock_name=stock_name)
    _exchange(base, {id(copy.module): new[copy.name] for b in blocks for copy in (b, *b.spares)})
    patched = [replace(block, module=new[block.name]) for block in chosen]
    return PatchReport(type(base).__name__, config, patched, skipped, original, stock_name)


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
    _exchange(base, {id(copy.module): _stock_block(copy) for b in blocks for copy in (b, *b.spares)})
    record.erase(base.config)
    blocks = [replace(b, module=base.get_submodule(b.name)) for b in blocks]
    return PatchReport(type(base).__name__, None, blocks, skipped, record.activation)


def inspect(model: nn.Module) -> PatchReport:
    """What :func:`patch` would change, or, on a patched model, what is patched. Changes nothing."""
    base = transformers_model(model)
    blocks, skipped = find_blocks(base)
    record = checkpoint_block.read(base.config)
    if record is None:
        return PatchReport(type(base).__name__, None, blocks, skipped)
    blocks = [block for block in blocks if isinstance(block.module, SparseMLP)]
    value = getattr(base.config, record.field)
    stock_name = None if value == checkpoint_block.KEY else value
    return PatchReport(type(base).__name__, record.config, blocks, skipped, record.activation, stock_name)


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
    config = replace(record.config, mix=k)
    if config == record.config:
        return
    for module in base.modules():
        if isinstance(module, SparseMLP):
            module.set_mix(config.mix)
    stock_name = _stock_name(base, config, record.field, record.activation, {})
    replace(record, config=config).write(base.config, stock_name=stock_name)


def patch_from_config(model: PreTrainedModel) -> None:
    """Patch a model under construction from the block in its config; nothing if it has none.

    Runs for inner models too, which may hold only some of the blocks: those are left to the outer model.

    Raises:
        ValueError: the block is malformed.

    """
    record = checkpoint_block.read(model.config)
    if record is None:
        return
    blocks, _ = find_blocks(model)
    if len(blocks) != record.blocks or any(isinstance(b.module, SparseMLP) for b in blocks):
        return
    chosen = _choose(model, blocks, record.config)
    for block in blocks:  # the config named the new activation; the stock blocks have the original one
        block.module._modules[block.roles.act] = ACT2FN[record.activation]
    for module in model.modules():  # what the field feeds beside the MLP blocks, such as a mixer
        for name, child in module._modules.items():
            if isinstance(child, UnpatchedActivation):
                module._modules[name] = ACT2FN[record.activation]
        for name, value in vars(module).items():
            if isinstance(value, str) and value == checkpoint_block.KEY:
                vars(module)[name] = record.activation
    _exchange(model, {id(b.module): _sparse_block(b, record.config, index) for index, b in enumerate(chosen)})


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
            pays where few neurons are active; several tokens in a call are computed without it. It is used
            while nobody but the model holds that projection, so that no change of it goes unnoticed: with an
            optimizer or a list of its parameters at hand, decoding goes on without. False ends its use.

    Raises:
        PatchError: the model is not patched, or has an activation that is never exactly zero.

    """
    base = transformers_model(model)
    sparse = [module for module in base.modules() if isinstance(module, SparseMLP)]
    if not sparse:
        raise PatchError(f"prepare needs a patched model; this {type(base).__name__} is not patched.")
    if certify and all(row_of(module.activation) is None for module in sparse):
        raise PatchError(
            f"certify=True needs activations that can be exactly zero; the blocks of this "
            f"{type(base).__name__} have {type(sparse[0].activation).__name__}. Patch with another one "
            'first, such as "relu".'
        )
    for module in sparse:
        module.prepare(certify=certify)


def _as_config(config: Any, given: dict[str, Any]) -> SparsityConfig:
    if isinstance(config, str):
        return SparsityConfig.from_dict({"activation": config, **given})
    if given:
        raise ValueError(
            f"give {', '.join(given)} in the SparsityConfig, or the activation as a name: "
            'patch(model, "fatrelu", threshold=0.01).'
        )
    if isinstance(config, Mapping):
        return SparsityConfig.from_dict(config)
    if not isinstance(config, SparsityConfig):
        raise ValueError(
            f"config={config!r} is neither a SparsityConfig nor the name of an activation; "
            f"choose one of {', '.join(ACTIVATIONS)}."
        )
    return config


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
            f"layers={config.layers} names block {max(indices)}, but {type(model).__name__} has blocks "
            f"0 to {len(blocks) - 1}."
        )
    if isinstance(config.threshold, tuple) and len(config.threshold) != len(indices):
        raise PatchError(
            f"threshold has {len(config.threshold)} values for {len(indices)} blocks; give one number, or "
            "one per patched block."
        )
    chosen = [blocks[i] for i in indices]
    for block in chosen:
        if relu_up(config.activation) and block.kind == "plain":
            raise PatchError(
                f'activation="{config.activation}" needs a gated MLP, but {block.name} ({type(block.module).__name__}) has '
                'no gate; use "relu".'
            )
        parts = {block.roles.gate, block.roles.up, block.roles.down, block.roles.act}
        if relu_up(config.activation) and (extra := block.module._modules.keys() - parts):
            raise PatchError(
                f'activation="{config.activation}" computes the block itself, but {block.name} also has '
                f'{", ".join(sorted(extra))}; use "relu".'
            )
        if "forward" in vars(block.module) and not hasattr(block.module, "_hf_hook"):
            raise PatchError(
                f"the forward of {block.name} was replaced by another tool (Liger's use_liger_kernel does "
                "so), and would undo the patch; turn that off for the MLP."
            )
    return chosen


def _sparse_block(block: Block, config: SparsityConfig, index: int) -> SparseMLP:
    stock = _stock_block(block)
    activation = build_activation(config, index, stock.get_submodule(block.roles.act))
    sparse: SparseMLP
    if block.kind == "gated":
        sparse = SparseGatedMLP(stock, block.roles, activation, relu_up=relu_up(config.activation))
    else:
        sparse = SparsePlainMLP(stock, block.roles, activation)
    sparse.set_mix(config.mix)
    return sparse


def _stock_block(block: Block) -> nn.Module:
    return block.module.restore() if isinstance(block.module, SparseMLP) else block.module


def _stock_activation(model: PreTrainedModel, blocks: list[Block]) -> tuple[str, str]:
    """The config field that names the activation, and its stock value."""
    record = checkpoint_block.read(model.config)
    if record is not None:
        return record.field, record.activation
    names = [f"{block.place}.{block.roles.act}" for block in blocks]
    field = activation_field(model, model.config, names)
    if field is None:
        raise PatchError(
            f"no field of {type(model.config).__name__} sets the activation of the MLP blocks, so a saved "
            "model could not say that it is patched. If the config is a composite, patch the language model "
            f"inside; otherwise please report the model type {model.config.model_type!r}."
        )
    return field, getattr(model.config, field)


def _stock_name(
    model: PreTrainedModel,
    config: SparsityConfig,
    field: str,
    original: str,
    activations: Mapping[str, nn.Module],
) -> str | None:
    """The activation name with which stock transformers builds the very model, None if there is none.

    ``activations``: by qualified name, those that are about to be put into ``model``.
    """
    if config.activation == "original":
        return original
    if not is_stock(config.activation) or config.mix != 1:
        return None
    same = builds_same(model, model.config, field, config.activation, activations)
    return config.activation if same else None


def _exchange(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new[id(old)]`` wherever ``old`` is registered; a block may be shared by several owners."""
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child is not None and id(child) in new:
                owner._modules[name] = new[id(child)]
