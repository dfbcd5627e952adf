"""What stock transformers would build from a config: found out by building it, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN

from hf_sparse.activations import is_stock
from hf_sparse.activations.config import ORIGINAL, same_function
from hf_sparse.activations.known import STOCK_ACTIVATIONS
from hf_sparse.adapters.copies import place
from hf_sparse.adapters.kept import MARK, KeptState
from hf_sparse.adapters.roles import linear_size, shape
from hf_sparse.adapters.walk import modules_of
from hf_sparse.checkpoint_block import KEY, Record, is_plain, names_activation, read
from hf_sparse.composite import Part, Path, nested
from hf_sparse.errors import PatchError
from hf_sparse.modules import SparseBlock

_ON_TRIAL = "_hf_sparse_on_trial"
"""Marks the config of a model that is built here, whose activation may be ours without a block."""


def refuse_missing_block(config: PretrainedConfig) -> None:
    """Refuse a config that has our activation, but no block that says what it is.

    Raises:
        ValueError: names the field.

    """
    own = vars(config)
    fields = [] if _ON_TRIAL in own else [name for name, value in own.items() if value == KEY]
    if fields:
        raise ValueError(
            f'{fields[0]}="{KEY}" needs the "{KEY}" block of a patched model, and this config has none; '
            "take it from the checkpoint that it came with, or name another activation."
        )


class UnpatchedActivation(nn.Module):
    """Stands where a config says ``"hf_sparse"`` until the patch puts the real activation there."""

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        unpatched()


def unpatched(*_: object, **__: object) -> NoReturn:
    """The forward of blocks that are to be patched and are not, where no activation can stand for that."""
    raise RuntimeError(
        'this MLP was built from a config whose activation is "hf_sparse", but was not patched: the model '
        "has another number of MLP blocks than the checkpoint, or only a part of it was built. Load the "
        "whole model, with all its layers, after `import hf_sparse`."
    )


def activation_field(
    model: PreTrainedModel, names: Iterable[str], *, saved: PretrainedConfig | None = None, path: Path = ()
) -> str | None:
    """The field of the config that sets the activations called ``names`` in ``model``, None if none does.

    A field that a saved config would not keep (one that is computed from another, or may not say what we
    write) is none. ``saved`` is that config, which has the one of ``model`` at ``path``; by default its own.
    """
    names = list(names)
    for field, value in sorted(vars(model.config).items()):
        if not names_activation(value) or not _sets(model, field, names):
            continue
        if is_kept(model.config, (), field) and (saved is None or is_kept(saved, path, field)):
            return field
    return None


def sets_activation(model: PreTrainedModel, field: str, activations: Mapping[str, nn.Module]) -> bool:
    """Whether ``field`` of the config made the stock ``activations`` (by name) of a ``model`` being built.

    They tell it themselves, unless another field says the same. Only then another model is built: this runs
    while a model is loaded, where that is best avoided.
    """
    config = model.config
    made = _stand_in(vars(config)[field])
    if not all(same_function(activation, made) for activation in activations.values()):
        return False
    alike = [
        other
        for other, value in vars(config).items()
        if names_activation(value) and same_function(_stand_in(value), made)
    ]
    return alike == [field] or _sets(model, field, list(activations))


def stock_activation(
    base: PreTrainedModel, part: Part, model: PreTrainedModel, activations: Mapping[str, nn.Module]
) -> tuple[str | None, str | None]:
    """The config field that names the ``activations`` (by name in ``model``), if there is one; what they are.

    Raises:
        PatchError: the config cannot say that the model is patched.

    """
    record = read(part.config)
    if record is not None:
        return record.field, record.activation
    field = activation_field(model, activations, saved=base.config, path=part.path)
    if (part.path or field is None) and not is_kept(base.config, part.path, KEY):
        where = ".".join(part.path) or "it"
        try:
            type(base.config).from_dict(base.config.to_dict())
        except Exception as error:
            raise PatchError(
                f"this {type(base.config).__name__} is refused when it is read back, patched or not: {error}"
            ) from error
        raise PatchError(
            f"{type(base.config).__name__} keeps no field of ours in {where}, so a saved model could not say "
            f"that it is patched; please report the model type {base.config.model_type!r}."
        )
    if field is None:
        return None, activation_name(list(activations.values()))
    value = getattr(part.config, field)
    if not is_plain(value):
        raise PatchError(
            f"{field}={value!r} of {type(part.config).__name__} makes an activation with parameters, "
            "which nothing can take the place of."
        )
    return field, value


def activation_name(activations: Sequence[nn.Module]) -> str | None:
    """The name by which transformers makes each of ``activations``; None if it has none, or they differ."""
    first = activations[0]
    if not all(same_function(one, first) for one in activations):
        return None
    for name, entry in ACT2CLS.items():
        cls = entry[0] if isinstance(entry, tuple) else entry
        if cls is type(first) and same_function(ACT2FN[name], first) and not first.state_dict():
            return name
    return None


def refuse_other_activation(
    model: PreTrainedModel, record: Record, activations: Mapping[str, nn.Module]
) -> None:
    """Refuse a record that is wrong about the stock ``activations`` (by name) of a ``model`` being built.

    Raises:
        ValueError: names the field.

    """
    if record.field is not None:
        if not sets_activation(model, record.field, activations):
            raise ValueError(
                f"stock.field={record.field!r} does not set the activation of the MLP blocks of "
                f"{type(model).__name__}; patch the original model again, and save it."
            )
        return
    made = None if record.activation is None else _stand_in(record.activation)
    for name, act in activations.items():
        if isinstance(act, UnpatchedActivation) or not (made is None or same_function(act, made)):
            raise ValueError(
                f"stock.activation={record.activation!r} is not what {type(model).__name__} has at {name}, "
                f"which is {type(act).__name__}; patch the original model again, and save it."
            )


def placeholders(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the children and of the attributes that are what a config made of the name ``"hf_sparse"``."""
    if type(module) is nn.Linear:  # most modules are, and torch's know no config
        return [], []
    children = [name for name, child in module._modules.items() if isinstance(child, UnpatchedActivation)]
    return children, [name for name, value in vars(module).items() if type(value) is str and value == KEY]


def put_back_around(model: PreTrainedModel, patched: Collection[nn.Module]) -> None:
    """Stock activations in what the config of a patched model feeds outside of it.

    Such as a connector between the parts of a composite, or a head. They are what stock transformers builds
    there. ``patched``: inner models in which there is nothing to be put back.
    """
    found = [(module, placeholders(module)) for module in modules_of(model, without=patched)]
    todo = {module: names for module, names in found if names != ([], [])}
    if not todo:
        return
    built = _named(build_stock(model, None, None))
    for name, module in model.named_modules():
        stock = built.get(name)
        if module not in todo or stock is None:  # what is left in place raises when it is called
            continue
        children, texts = todo[module]
        for child in children:
            module._modules[child] = stock._modules[child]
        vars(module).update((text, vars(stock)[text]) for text in texts)


def stock_name(
    model: PreTrainedModel, record: Record, blocks: Mapping[str, nn.Module], path: Path = ()
) -> str | None:
    """The activation name with which stock transformers builds the very model, None if there is none.

    ``blocks``: all MLP blocks of which ``record`` speaks by their places, as a patch is about to put them
    into ``model``. ``path``: where its config has the one of the record.
    """
    activation = record.config.activation
    if record.config.others:
        return None
    if activation.name == ORIGINAL:
        name = record.activation
    elif is_stock(activation.name) and activation.mix == 1:
        name = activation.name
    else:
        return None
    if name is None or (record.field is None and name != record.activation):
        return None
    return name if builds_same(model, record.field, name, blocks, path) else None


def builds_same(
    model: PreTrainedModel,
    field: str | None,
    value: str,
    blocks: Mapping[str, nn.Module],
    path: Path = (),
) -> bool:
    """Whether stock transformers, with ``field`` of the config set to ``value``, builds ``model``.

    ``blocks``: as for :func:`stock_name`; everything else is the model's own. A field may feed more than the
    MLPs (the mixers of a hybrid, a head, what connects the parts of a composite), or a string that a forward
    reads; and a block may hold parameters that a stock block does not have.
    """
    built = _named(build_stock(model, field, value, path))
    if not blocks.keys() <= built.keys():
        return False
    if not all(same_tensors(block, built[name]) for name, block in blocks.items()):
        return False
    ours = {place(name): module for name, module in model.named_modules()}
    for name, block in blocks.items():
        ours.update(block.named_modules(prefix=name))
    others = _patched_activations(ours, blocks)
    for name, module in built.items():
        mine = ours.get(name)
        if mine is None and isinstance(module, STOCK_ACTIVATIONS) and _inside(name, blocks):
            return False  # ours has the activation written into its forward
        if mine is None or name.startswith(others):  # other parts are the business of their own record
            continue
        is_activation = isinstance(module, STOCK_ACTIVATIONS) or isinstance(mine, STOCK_ACTIVATIONS)
        if is_activation and type(module) is not type(mine):
            return False
        for attribute, text in vars(module).items():
            if isinstance(text, str) and text in ACT2FN and vars(mine).get(attribute) != text:
                return False
    return True


def same_tensors(ours: nn.Module, built: nn.Module) -> bool:
    """Whether both have parameters and saved buffers of the same names and shapes.

    What another tool has put in the place of a stock module (LoRA, a quantised layer) is its own affair.
    """
    if _tensors(ours) != _tensors(built):
        return False
    for name in ours._modules.keys() | built._modules.keys():
        mine, theirs = ours._modules.get(name), built._modules.get(name)
        if mine is None or theirs is None:
            alone = mine or theirs
            if alone is not None and alone.state_dict(keep_vars=True):
                return False
        elif type(mine) is type(theirs) and not same_tensors(mine, theirs):
            return False
    return True


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Names and shapes of the module's own tensors. Linear layers declare theirs: weights may be sharded."""
    own = {**module._parameters, **module._buffers}
    held = {k: v for k, v in own.items() if v is not None and k not in module._non_persistent_buffers_set}
    size = None if isinstance(module, SparseBlock) else linear_size(module)
    if size is not None:
        return dict.fromkeys(held, size)
    return {name: shape(tensor) for name, tensor in held.items()}


def _patched_activations(modules: Mapping[str, nn.Module], but: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Prefixes of the names of activations that a patch has put into ``modules``, ``but`` for some blocks."""
    found = []
    for name, module in modules.items():
        if isinstance(module, SparseBlock) and name not in but:
            found.append(f"{name}.")
        state = vars(module).get(MARK)
        if isinstance(state, KeptState) and f"{name}.{state.roles.act}" not in but:
            found.append(f"{name}.{state.roles.act}")
    return tuple(found)


def _inside(name: str, blocks: Iterable[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _sets(model: PreTrainedModel, field: str, names: list[str]) -> bool:
    # Something else than it says now: another field may say that as well.
    value = "relu" if vars(model.config)[field] == KEY else KEY
    modules, made = _named(build_stock(model, field, value)), type(_stand_in(value))
    return all(type(modules.get(name)) is made for name in names)


def is_kept(config: PretrainedConfig, path: Path, field: str) -> bool:
    """Whether what we write to ``field``, of the config at ``path``, comes back from a saved ``config``."""
    changed = copy.deepcopy(config)
    try:
        setattr(nested(changed)[path], field, KEY)
        return getattr(nested(type(config).from_dict(changed.to_dict()))[path], field, None) == KEY
    except Exception:  # a config that refuses the value does not keep it
        return False


def _stand_in(name: str) -> nn.Module:
    """The module that transformers makes of a name."""
    return UnpatchedActivation() if name == KEY else ACT2FN[name]


def build_stock(
    model: PreTrainedModel, field: str | None, value: str | None, path: Path = ()
) -> PreTrainedModel | None:
    """A weightless stock model as ``model``; None if it cannot be built.

    With one field changed of its config, or of the one in it at ``path``; None for none.
    """
    config = copy.deepcopy(model.config)
    registered = KEY in ACT2FN
    try:
        ACT2FN[KEY] = UnpatchedActivation
        for where, one in nested(config).items():
            if (record := read(one)) is not None:
                record.erase(one)
            if where == path and field is not None:
                setattr(one, field, value)
            vars(one)[_ON_TRIAL] = True
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return type(model)(config)
    except Exception:  # a field that accepts no other value is not the one
        return None
    finally:
        if not registered:
            del ACT2FN[KEY]


def _named(model: nn.Module | None) -> dict[str, nn.Module]:
    return {} if model is None else dict(model.named_modules())
