"""What a patched model computes, read off its modules; and its config brought in line with that.

Users remove, repeat and exchange layers, put activations in by hand, and give models other config objects.
What is saved must say what the modules compute, or not be saved.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_sparse import checkpoint_block
from hf_sparse.activations.config import same_function
from hf_sparse.adapters import Block
from hf_sparse.adapters.block import replaced_around
from hf_sparse.checkpoint_block import KEY, Record
from hf_sparse.composite import Part, nested, own_blocks, parts_of, pass_on_refusal
from hf_sparse.errors import PatchError
from hf_sparse.modules import ParameterLeaf, SparseBlock, sparse_part
from hf_sparse.stock import build_stock, same_tensors, stock_name, unpatched

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def described(model: PreTrainedModel, record: Record) -> Record | None:
    """The record of ``model`` as its modules are now, where its config has ``record``; None if it is stock.

    Raises:
        PatchError: no record can say what the modules compute.

    """
    blocks, _ = own_blocks(model)
    made = _stock_activations(model, record, blocks)
    for block in blocks:
        if vars(block.module).get("forward") is unpatched:
            raise PatchError(
                f"{block.name} was to be patched and is not: this {type(model).__name__} has another "
                "number of MLP blocks than its config says. Load the whole model, with all its layers."
            )
        act = block.original_activation
        if not same_function(act, made[block.place]):
            kind = "the original activation of" if block.is_patched else "the unpatched"
            what = f"{kind} {block.name}"
            said = record.activation or made[block.place] or "none that the config builds"
            raise PatchError(
                f"the config says that {what} is {said!r}, but it is {act}. "
                "Put that back, or hf_sparse.unpatch(model) and patch again."
            )
    patched = [block for block in blocks if block.is_patched]
    if not patched:
        return None
    _refuse_unlike_parts(patched, record)
    _refuse_unknown_parameters(patched, record)
    _refuse_lost_blocks(model, blocks, record)
    parts = {name: part.found_in(patched) for name, part in record.config.parts.items()}
    for part in parts.values():
        part.confirm(model, patched, blocks)
    indices = tuple(i for i, block in enumerate(blocks) if block.is_patched)
    layers = None if len(indices) == len(blocks) and record.config.layers != indices else indices
    config = record.config.changed(**parts, layers=layers)
    if not config.uniform:
        _refuse_repeated(model, blocks, record)
    return Record.of(config, len(blocks), record.field, record.activation)


def described_part(part: Part) -> Record | None:
    """The same of a part of a model, None if it is not patched.

    Raises:
        PatchError: likewise; or it is two models of one config, that say different things.

    """
    record = checkpoint_block.read(part.config)
    if record is None:
        return None
    found = [described(model, record) for _, model in part.models]
    if any(one != found[0] for one in found):
        _refuse_unlike([name for name, _ in part.models])
    return found[0]


@contextmanager
def in_line(model: PreTrainedModel) -> Iterator[None]:
    """While ``model`` is saved in here, its config says what its modules compute, and mostly afterwards, too.

    Only where no block is patched any more, the config has its ``"hf_sparse"`` block back afterwards: it may
    be shared with another model that is patched.

    Raises:
        PatchError: no config can say it, or this config is not that of the patched model.
        ValueError: the block in the config was changed by hand to something malformed.

    """
    parts = _owners(model)
    records = [checkpoint_block.read(part.config) for part in parts]
    stock: list[tuple[Part, Record, str | None]] = []
    for part, record in zip(parts, records, strict=True):
        assert record is not None
        if not _bring_in_line(model, part, record):
            stock.append((part, record, record.stock_name_in(part.config)))
    for part, record, _ in stock:
        record.erase(part.config)
    pass_on_refusal(model.config)
    try:
        yield
    finally:
        for part, record, name in stock:
            record.write(part.config, stock_name=name)
        pass_on_refusal(model.config)


def _owners(model: PreTrainedModel) -> list[Part]:
    """What ``model`` has of each config with a block among those that are saved.

    Raises:
        PatchError: there are patched blocks in none of them.

    """
    sparse = [name for name, module in model.named_modules() if sparse_part(module) is not None]
    if not sparse and not any(map(checkpoint_block.has, nested(model.config).values())):
        return []
    parts = parts_of(model)
    if stray := [name for name in sparse if not checkpoint_block.has(_innermost(parts, name).config)]:
        raise PatchError(
            f"{len(stray)} MLP blocks ({stray[0]}, ...) are patched, but the config that is saved has no "
            f'"{KEY}" block that says so: it was replaced after the patch. Patch the model again, or '
            "hf_sparse.unpatch(model) with its former config."
        )
    return [part for part in parts if checkpoint_block.has(part.config)]


def _innermost(parts: Sequence[Part], name: str) -> Part:
    """The part that has the module of that ``name``."""

    def depth(part: Part) -> int:
        return max((len(m) for m, _ in part.models if not m or name.startswith(f"{m}.")), default=-1)

    return max(parts, key=depth)


def _bring_in_line(model: PreTrainedModel, part: Part, record: Record) -> bool:
    """Let the config say what the modules compute; False where none is patched."""
    with checkpoint_block.refusing():
        record.agree(part.config)
    now = described_part(part)
    if now is None:
        return False
    for block in part.all_blocks:
        if block.stays and block.is_patched and (by := block.replaced_forward):  # others say so themselves
            warnings.warn(
                f"the forward of {block.name} was replaced by {by}: what is saved computes what the config "
                "says, and not that.",
                stacklevel=2,
            )
    for by in replaced_around(model, part.all_blocks):
        warnings.warn(
            f"the forward of a module around MLP blocks was replaced by {by}; what is saved computes what "
            "the config says, whether that calls them or not.",
            stacklevel=2,
        )
    blocks = {name: one for block in part.all_blocks for name, one in block.parts.items()}
    if now != record:
        now.write(part.config, stock_name=stock_name(model, now, blocks, part.path))
    elif record.stock_name_in(part.config) is not None:
        # A part may have been patched without the model around it, which may read the same field.
        around = part.path and stock_name(model, now, blocks, part.path) is None
        if around or any(map(_holds_more, blocks.values())):
            now.write(part.config, stock_name=None)
    elif record.field is None:  # the model may have been loaded with other fusions in the place of ours
        now.write(part.config, stock_name=None)
    return True


def _stock_activations(
    model: PreTrainedModel, record: Record, blocks: Sequence[Block]
) -> Mapping[str, nn.Module | None]:
    """What the config says that the activations were, by places; None where it builds no such block."""
    if record.activation is not None:
        return dict.fromkeys((block.place for block in blocks), ACT2FN[record.activation])
    built = build_stock(model, None, None)
    found = {} if built is None else {block.place: block.activation for block in own_blocks(built)[0]}
    return {block.place: found.get(block.place) for block in blocks}


def _refuse_unlike(names: Sequence[str]) -> None:
    raise PatchError(
        f"{' and '.join(names)} are built from one config, which cannot say that they differ: patch the "
        "whole model, or hf_sparse.unpatch it."
    )


def _holds_more(block: nn.Module) -> bool:
    """Whether a patched block has other tensors than the stock one that it stands for."""
    return isinstance(block, SparseBlock) and not same_tensors(block, block.stock)


def _refuse_unlike_parts(patched: Sequence[Block], record: Record) -> None:
    said = tuple(name for name, _ in record.config.others)
    for block in patched:
        one = sparse_part(block.module)
        assert one is not None
        if one.others != said:
            raise PatchError(
                f"{block.name} was patched with {_listed(one.others)} beside the activation, and the config "
                f"of the model says {_listed(said)}. Patch the model again, or hf_sparse.unpatch(model)."
            )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "nothing"


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
    known = set() if built is None else {block.place for block in own_blocks(built)[0]}
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
    if built is None or len(own_blocks(built)[0]) != len(blocks):
        raise PatchError(
            f"{len(blocks)} MLP blocks are in {places} places of this {type(model).__name__}, and its config "
            "tells blocks apart by their number. Give each layer a block of its own (copy.deepcopy), or use "
            "one activation and one value for all."
        )
