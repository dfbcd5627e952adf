"""A model under construction, patched from what its config says: what ``from_pretrained`` ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import PreTrainedModel

from hf_sparse import checkpoint_block
from hf_sparse.adapters import Block, require_blocks
from hf_sparse.adapters.walk import modules_of
from hf_sparse.composite import inner_models, own_blocks
from hf_sparse.exchange import choose, exchange, new_modules, outside, put_back
from hf_sparse.stock import put_back_around, refuse_missing_block, refuse_other_activation, unpatched


def patch_from_config(model: PreTrainedModel) -> None:
    """Patch a model under construction from the block in its config; nothing if it has none.

    Runs for inner models before the outer one, which finds their blocks patched. An inner model may hold only
    some of the blocks: if the config tells them apart by their number, they are left to the outer model.
    Parts with a config of their own have patched themselves.

    Raises:
        ValueError: the block is malformed, or does not fit the model or the rest of its config.

    """
    inner = [one for _, one in inner_models(model) if checkpoint_block.has(one.config)]
    is_inner = model.base_model is model
    for one in inner:
        _patch_from_own_config(one, may_be_some=is_inner)
    done = _done_inside(model)
    _patch_from_own_config(model, may_be_some=is_inner, done=done)
    has_own = checkpoint_block.has(model.config)
    # Placeholders of an inner model that was not patched stay: they raise.
    if (inner or has_own) and not (is_inner and has_own):
        put_back_around(model, [*inner, *done])


_done: WeakKeyDictionary[PreTrainedModel, tuple[int, list[ref[nn.Module]]]] = WeakKeyDictionary()
"""Models that have just been patched wholly: how many blocks they have, and all their modules."""


def _gone(_: object) -> None:
    """Tells these references from those of somebody who may change a module: held_weakly knows its name."""


def _done_inside(model: PreTrainedModel) -> dict[PreTrainedModel, int]:
    """The inner model of the same config, if it has been patched wholly, with the number of its blocks.

    And if since then no module of it has come or gone: then there is nothing to be found in it.
    """
    inner = model.base_model
    if not isinstance(inner, PreTrainedModel) or inner not in model._modules.values():
        return {}
    count, modules = _done.pop(inner, (0, []))
    unchanged = modules_of(inner) == [one() for one in modules]
    return {inner: count} if unchanged and inner.config is model.config else {}


def _patch_from_own_config(
    model: PreTrainedModel, *, may_be_some: bool, done: Mapping[PreTrainedModel, int] = MappingProxyType({})
) -> None:
    record = checkpoint_block.read(model.config)
    if record is None:
        refuse_missing_block(model.config)
        return
    with checkpoint_block.refusing():
        record.agree(model.config)
        blocks, _ = own_blocks(model, without=done)
        count = len(blocks) + sum(done.values())
        todo = [block for block in blocks if not block.is_patched]
        if record.field is None:
            _let_go(todo)
        if not record.config.uniform:
            if may_be_some and count != record.blocks:
                if record.field is None:
                    _hold_back(todo)
                return
            if record.blocks != count:
                raise ValueError(
                    f"blocks={record.blocks} is not the number of MLP blocks of this {type(model).__name__}, "
                    f"which is {count}; load it with all its layers."
                )
            if len(todo) < count:
                return
        if not count and not may_be_some:
            require_blocks(model)
            raise ValueError(f"{type(model).__name__} has no MLP block outside of its parts; take it out.")
        if not todo:
            return
        chosen = choose(model, todo, record.config)
        made = {f"{block.name}.{block.roles.act}": block.activation for block in todo}
        refuse_other_activation(model, record, made)
        if record.field is not None and record.activation is not None:
            put_back(model, todo, record.activation)
        config = record.config.fitted(model, chosen)
        new, around = new_modules(todo, chosen, config), outside(model, todo, chosen, config)
        exchange(model, todo, new, around)
        _done[model] = count, [ref(one, _gone) for one in modules_of(model)]


def _hold_back(blocks: Sequence[Block]) -> None:
    """Let ``blocks`` raise when they are called, until the outer model patches them or lets them go."""
    for block in blocks:
        vars(block.module)["forward"] = unpatched


def _let_go(blocks: Sequence[Block]) -> None:
    for block in blocks:
        if vars(block.module).get("forward") is unpatched:
            del vars(block.module)["forward"]
