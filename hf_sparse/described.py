"""What a patched model computes, read off its modules; and its config brought in line with that.

Users remove, repeat and exchange layers, put activations in by hand, and give models other config objects.
What is saved must say what the modules compute, or not be saved.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse import checkpoint_block
from hf_sparse.activations.config import same_function
from hf_sparse.adapters import Block, find_blocks
from hf_sparse.checkpoint_block import KEY, Record
from hf_sparse.errors import PatchError
from hf_sparse.modules import ParameterLeaf, SparseBlock, sparse_part
from hf_sparse.stock import build_stock, same_tensors, stock_name

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def described(model: PreTrainedModel, record: Record) -> Record | None:
    """The record of ``model`` as its modules are now, where its config has ``record``; None if it is stock.

    Raises:
        PatchError: no record can say what the modules compute.

    """
    blocks, _ = find_blocks(model)
    made = ACT2FN[record.activation]
    for block in blocks:
        act = block.original_activation
        if not same_function(act, made):
            kind = "the original activation of" if block.is_patched else "the unpatched"
            what = f"{kind} {block.name}"
            raise PatchError(
                f"the config says that {what} is {record.activation!r}, but it is {act}. Put that back, or "
                "hf_sparse.unpatch(model) and patch again."
            )
    patched = [block for block in blocks if block.is_patched]
    if not patched:
        return None
    _refuse_unknown_parameters(patched, record)
    _refuse_lost_blocks(model, blocks, record)
    parts = {name: part.found_in(patched) for name, part in record.config.parts.items()}
    indices = tuple(i for i, block in enumerate(blocks) if block.is_patched)
    layers = None if len(indices) == len(blocks) and record.config.layers != indices else indices
    config = record.config.changed(**parts, layers=layers)
    if not config.uniform:
        _refuse_repeated(model, blocks, record)
    return Record.of(config, len(blocks), record.field, record.activation)


@contextmanager
def in_line(model: PreTrainedModel) -> Iterator[None]:
    """While ``model`` is saved in here, its config says what its modules compute, and mostly afterwards, too.

    Only where no block is patched any more, the config has its ``"hf_sparse"`` block back afterwards: it may
    be shared with another model that is patched.

    Raises:
        PatchError: no config can say it, or this config is not that of the patched model.
        ValueError: the block in the config was changed by hand to something malformed.

    """
    owners = _owners(model)
    records = [checkpoint_block.read(owner.config) for owner in owners]
    stock: list[tuple[PretrainedConfig, Record, str]] = []
    for owner, record in zip(owners, records, strict=True):
        assert record is not None
        if not _bring_in_line(owner, record):
            stock.append((owner.config, record, vars(owner.config)[record.field]))
    for config, record, _ in stock:
        record.erase(config)
    try:
        yield
    finally:
        for config, record, value in stock:
            record.write(config, stock_name=value)


def _owners(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The outermost model, ``model`` or in it, of each config with a block among those that are saved.

    Raises:
        PatchError: there are patched blocks in none of them.

    """
    sparse = [name for name, module in model.named_modules() if sparse_part(module) is not None]
    if not sparse and not checkpoint_block.has(model.config):
        return []
    owners: dict[str, PreTrainedModel] = {}
    saved = {id(config) for config in _nested(model.config)}
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or _inside(name, owners):
            continue
        if checkpoint_block.has(module.config) and id(module.config) in saved:
            owners[name] = module
    if stray := [name for name in sparse if not _inside(name, owners)]:
        raise PatchError(
            f"{len(stray)} MLP blocks ({stray[0]}, ...) are patched, but the config that is saved has no "
            f'"{KEY}" block that says so: it was replaced after the patch. Patch the model again, or '
            "hf_sparse.unpatch(model) with its former config."
        )
    return list(owners.values())


def _bring_in_line(model: PreTrainedModel, record: Record) -> bool:
    """Let the config say what the modules compute; False where none is patched."""
    with checkpoint_block.refusing():
        record.agree(model.config)
    now = described(model, record)
    if now is None:
        return False
    found, _ = find_blocks(model)
    for block in found:
        if block.stays and block.is_patched and (by := block.replaced_forward):  # others say so themselves
            warnings.warn(
                f"the forward of {block.name} was replaced by {by}: what is saved computes what the config "
                "says, and not that.",
                stacklevel=2,
            )
    blocks = {name: part for block in found for name, part in block.parts.items()}
    if now != record:
        now.write(model.config, stock_name=stock_name(model, now, blocks))
    elif vars(model.config)[record.field] != KEY and any(map(_holds_more, blocks.values())):
        now.write(model.config, stock_name=None)
    return True


def _holds_more(block: nn.Module) -> bool:
    """Whether a patched block has other tensors than the stock one that it stands for."""
    return isinstance(block, SparseBlock) and not same_tensors(block, block.stock)


def _refuse_unknown_parameters(patched: Sequence[Block], record: Record) -> None:
    for block in patched:
        for name, child in block.module._modules.items():
            if isinstance(child, ParameterLeaf) and name not in record.config.parts:
                raise PatchError(
                    f"{block.name}.{name} ({type(child).__name__}) holds parameters of which the config says "
                    "nothing; patch the model with a SparsityConfig that has this part."
                )


def _refuse_lost_blocks(model: PreTrainedModel, blocks: Sequence[Block], record: Record) -> None:
    """Where other layers have a block, one layer may have another tool's module; loading would undo that."""
    places = {block.place for block in blocks}
    patterns = {_LAYER.sub("*", place) for place in places}
    others = [
        name for name, _ in model.named_modules() if name not in places and _LAYER.sub("*", name) in patterns
    ]
    if not others:
        return
    built = build_stock(model, record.field, record.activation)
    known = set() if built is None else {block.place for block in find_blocks(built)[0]}
    if lost := [name for name in others if name in known]:
        raise PatchError(
            f"{lost[0]} is a {type(model.get_submodule(lost[0])).__name__}, where the config builds an MLP "
            "block: another tool has replaced it. Put the block back, or hf_sparse.unpatch(model) first."
        )


def _refuse_repeated(model: PreTrainedModel, blocks: Sequence[Block], record: Record) -> None:
    """Blocks in several places count once here; loading must count them so, too."""
    ids = {id(block.module) for block in blocks}
    places = sum(id(module) in ids for _, module in model.named_modules(remove_duplicate=False))
    if places == len(blocks):
        return
    built = build_stock(model, record.field, record.activation)
    if built is None or len(find_blocks(built)[0]) != len(blocks):
        raise PatchError(
            f"{len(blocks)} MLP blocks are in {places} places of this {type(model).__name__}, and its config "
            "tells blocks apart by their number. Give each layer a block of its own (copy.deepcopy), or use "
            "one activation and one value for all."
        )


def _nested(config: PretrainedConfig) -> list[PretrainedConfig]:
    found: list[PretrainedConfig] = []
    todo = [config]
    while todo:
        one = todo.pop()
        if all(one is not other for other in found):
            found.append(one)
            todo += [value for value in vars(one).values() if isinstance(value, PretrainedConfig)]
    return found


def _inside(name: str, owners: dict[str, PreTrainedModel]) -> bool:
    return any(not owner or name == owner or name.startswith(f"{owner}.") for owner in owners)
