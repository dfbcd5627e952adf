"""Blocks for blocks: which are meant, what comes in their place, and putting it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse.activations import build_activation
from hf_sparse.activations.cats import check_own
from hf_sparse.activations.config import same_function
from hf_sparse.adapters import Block
from hf_sparse.adapters.copies import active
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.kept import owners
from hf_sparse.adapters.roles import shape
from hf_sparse.adapters.split import is_split, splitting
from hf_sparse.adapters.walk import modules_of
from hf_sparse.checks import shown
from hf_sparse.config import PARTS, SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.modules import KeptChange, SparseBlock, SparseExperts, SparseGatedMLP, SparsePlainMLP
from hf_sparse.modules.zeroth_bias import follow
from hf_sparse.stock import placeholders


def choose(model: PreTrainedModel, blocks: list[Block], config: SparsityConfig) -> list[Block]:
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
        for name, part in config.others:
            if block.stays and not part.stays:
                raise PatchError(
                    f"{name} belongs into an MLP block of our own, but {block.name} stays a "
                    f"{block.stock_class.__name__} when it is patched; leave {name} out."
                )
        if by := block.replaced_forward:
            raise PatchError(
                f"the forward of {block.name} was replaced by {by} (Liger's use_liger_kernel does so), which "
                "would undo the patch; turn that off for the MLP, or load a model that was patched before it "
                "was saved."
            )
        if is_split(block.module) and not block.stays and splitting(block.module) is None:
            raise PatchError(
                f"{block.name} is split between processes in a way that cannot be carried over to another "
                "module. Patch the model before: hf_sparse.patch and save_pretrained without a "
                "distributed_config, then from_pretrained of that with it."
            )
    return chosen


def new_modules(
    blocks: Sequence[Block], chosen: Sequence[Block], config: SparsityConfig
) -> dict[str, nn.Module | KeptChange]:
    """By name, what comes in the place of ``blocks`` and their spares, or is put into them.

    Of those ``chosen``, sparse blocks; of the others, stock ones.
    """
    indices = {block.name: index for index, block in enumerate(chosen)}
    new: dict[str, nn.Module | KeptChange] = {}
    for block in blocks:
        index = indices.get(block.name)
        for copy in (block, *block.spares):  # the other adapters' copies, for when they are switched to
            new[copy.name] = _stock(copy) if index is None else _sparse(copy, config, index)
    return new


def new_activation(block: Block, config: SparsityConfig, index: int) -> nn.Module:
    """What ``config`` puts in the place of the activation of ``block``, the ``index``-th patched one.

    Raises:
        PatchError: the block cannot have it.

    """
    check_own(config.activation.name, block)
    activation = build_activation(config.activation, index, block.original_activation)
    for _, part in config.others:
        activation = part.around(activation, index, block)
    return activation


def _sparse(block: Block, config: SparsityConfig, index: int) -> SparseBlock | KeptChange:
    activation = new_activation(block, config, index)
    others = tuple(name for name, _ in config.others)
    if block.stays:
        return KeptChange.to_sparse(block, activation, config.activation.mix, others)
    kind: type[SparseBlock] = SparseGatedMLP if block.form == "gated" else SparsePlainMLP
    if isinstance(block.roles, Experts):
        kind = SparseExperts
    sparse = kind(_stock_block(block), block.roles, activation, relu_up=config.activation.relu_up)
    if config.activation.mix != 1:
        sparse.set_mix(config.activation.mix)
    if others:
        sparse.others = others
    for name, part in config.others:
        part.build(sparse, index)
        _keep_trained(name, block.module, sparse)
    return sparse


def _keep_trained(name: str, former: nn.Module, sparse: SparseBlock) -> None:
    """Let ``sparse`` have the leaf ``name`` of the block that it replaces, if it says the same of it."""
    old, new = former._modules.get(name), sparse._modules.get(name)
    if old is None or new is None or not isinstance(former, SparseBlock):
        return
    one = active(old)
    shapes = [{k: shape(p) for k, p in each.named_parameters()} for each in (one, new)]
    if same_function(one, new) and shapes[0] == shapes[1]:
        sparse._modules[name] = old


def _stock(block: Block) -> nn.Module | KeptChange:
    return KeptChange.to_stock(block) if block.stays else _stock_block(block)


def _stock_block(block: Block) -> nn.Module:
    return block.module.restore() if isinstance(block.module, SparseBlock) else block.module


def places(blocks: Sequence[Block], new: Mapping[str, nn.Module | KeptChange]) -> dict[str, nn.Module]:
    """By their places, the modules that tell a model in which ``blocks`` are exchanged from another one."""
    parts: dict[str, nn.Module] = {}
    for block in blocks:
        one = new[block.name]
        if isinstance(one, KeptChange):
            parts[f"{block.place}.{block.roles.act}"] = one.activation
        else:
            parts[block.place] = one
    return parts


def put_back(model: nn.Module, blocks: Sequence[Block], activation: str) -> None:
    """Stock activations where the config named the new one, in ``blocks`` and in whatever else it feeds."""
    for block in blocks:
        for owner, name in owners(block.module, block.roles.act):
            owner._modules[name] = ACT2FN[activation]
    for module in modules_of(model):  # such as a mixer
        children, texts = placeholders(module)
        for name in children:
            module._modules[name] = ACT2FN[activation]
        for name in texts:
            vars(module)[name] = activation


def outside(
    model: nn.Module, blocks: Sequence[Block], chosen: Sequence[Block], config: SparsityConfig
) -> list[Callable[[], None]]:
    """What is done outside of ``blocks`` when those ``chosen`` are patched as ``config`` says, and no others.

    Raises:
        PatchError: ``model`` cannot take the config.

    """
    undone = [one for part in PARTS.values() for one in part.undoing(model, blocks)]
    return undone + [one for _, part in config.others for one in part.outside(model, chosen, blocks)]


def exchange(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    new: Mapping[str, nn.Module | KeptChange],
    around: Sequence[Callable[[], None]],
) -> None:
    """Put ``new[name]`` wherever a block or spare of that name is; it may be shared by several owners.

    ``around``: what is :func:`outside` of them.
    """
    exchanged: dict[int, nn.Module] = {}
    for copy in (copy for block in blocks for copy in (block, *block.spares)):
        one = new[copy.name]
        if isinstance(one, KeptChange):
            one.make()
        else:
            exchanged[id(copy.module)] = one
    for owner in modules_of(model):
        for name, child in owner._modules.items():
            if child is not None and id(child) in exchanged:
                owner._modules[name] = exchanged[id(child)]
    follow(model)
    for change in around:
        change()
