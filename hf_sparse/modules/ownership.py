"""Who else holds a weight, or its memory; and the layout for decoding, which is lent and given back.

A weight's storage and strides belong to whoever trains, shards, shares or saves it. Fused optimizers read a
parameter, its gradient and their own state as if all had the same strides; FSDP and DeepSpeed gather into
buffers of their own; ``randn_like`` and collectives go by strides; ``safetensors`` and ``Tensor.view`` want
rows. So a down projection is stored neuron by neuron only while it is nobody's business:

- :func:`lend` does it, to a weight that nobody but its block holds (no optimizer, list or variable:
  :func:`held_elsewhere`), to memory that nothing else shares, without a gradient;
- :func:`give_back` undoes it. Blocks call it before anybody reaches their weights through the module tree
  (:mod:`hf_sparse.modules.guarded`), in training mode and in every forward with gradient.

Where that cannot be known the weight stays as it is.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import triton_ops
from hf_sparse.adapters.int8 import int8_of
from hf_sparse.modules.surroundings import outside
from triton_ops.layout import stock_layout_, view_of

_lent: dict[int, weakref.ref[Tensor]] = {}
"""The weights that are stored neuron by neuron now, by ``id``."""


def lend(weight: Tensor) -> Tensor | None:
    """``weight [D, F]``, which only its block holds, stored neuron by neuron; a tensor on the same memory.

    A view, for the weight may be given back by another thread while a kernel reads. None if the layout is not
    ours to change, and on the meta device.
    """
    if not triton_ops.is_neuron_major(weight):
        if weight.is_meta or weight.grad is not None or not shares_nothing(weight):
            return None
        key = id(weight)
        _lent[key] = weakref.ref(weight, lambda _: _lent.pop(key, None))
        with outside():
            triton_ops.neuron_major_(weight)
    return view_of(weight)


def neuron_major(weight: Tensor) -> Tensor | None:
    """A weight stored neuron-major: same values and shape, other strides; None where its layout must stay.

    While compiling it is what it is: a graph must not change its own inputs, and the operators are right
    either way.
    """
    return weight if torch.compiler.is_compiling() else lend(weight)


def give_back(weight: Tensor) -> None:
    """Store ``weight`` as ``nn.Linear`` does, if it was lent; values and shape stay."""
    if not is_lent(weight):
        return
    _lent.pop(id(weight), None)  # another thread may have been first
    with outside():
        stock_layout_(weight)
    # Backward gives a gradient the strides that the weight has just then.
    if weight.grad is not None and not weight.grad.is_contiguous():
        weight.grad = weight.grad.contiguous()


def any_lent() -> bool:
    """Whether any weight of any model is lent; the quick question before that for one of them."""
    return bool(_lent)


def is_lent(weight: Tensor) -> bool:
    """Whether ``weight`` is stored neuron by neuron because :func:`lend` did so."""
    held = _lent.get(id(weight))
    return held is not None and held() is weight and triton_ops.is_neuron_major(weight)


def shares_nothing(weight: Tensor) -> bool:
    """Whether no other tensor, array or process holds the memory of ``weight``, as far as torch knows.

    Views, detached tensors (a state dict that somebody keeps), buffers that it was gathered into, shared
    memory, arrays; False where torch cannot tell.
    """
    storage = weight.untyped_storage()
    if weight.device.type == "cpu" and storage.is_shared():
        return False
    if _uses(storage) != _USES_ALONE:
        return False
    # Memory that torch did not allocate: numpy's or another library's, unless a checkpoint is mapped there.
    return storage.resizable() or _lies_in_a_file(storage)


def held_elsewhere(holder: Mapping[Any, object] | Sequence[object], key: Any, holders: int = 1) -> bool:
    """Whether anybody else than ``holders`` containers, ``holder`` among them, refers to ``holder[key]``.

    So does who took it long ago: a list of parameters, an optimizer, a variable. To be asked while no
    variable of the caller refers to it.
    """
    return sys.getrefcount(holder[key]) > _REFERENCES_ALONE - 1 + holders


def module_held_elsewhere(
    holder: Mapping[Any, nn.Module | None] | Sequence[nn.Module],
    key: Any,
    holders: int,
    sharer: nn.Module | None = None,
) -> bool:
    """:func:`held_elsewhere` of a module, which may hold itself.

    torchao gives a layer a method of its own, bound to it, among its attributes; ``sharer`` has these, too.
    """
    if not held_elsewhere(holder, key, holders):
        return False
    attributes = [vars(one) for one in (holder[key], sharer) if one is not None]
    return held_elsewhere(holder, key, holders + _bound_to(holder[key], attributes))


def _bound_to(one: object, places: Sequence[dict[str, Any]]) -> int:
    """How many methods of ``one`` there are that nobody has but ``places``, or functions that are there."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for values in places:
        for name in [name for name, value in values.items() if type(value) is MethodType]:
            found.setdefault(id(values[name]), []).append((values, name))
    count = 0
    for (values, name), *others in found.values():
        if values[name].__self__ is one and not held_elsewhere(values, name, 1 + len(others)):
            function = values[name].__func__
            count += 1 + (_bound_to(one, [function.keywords]) if type(function) is partial else 0)
    return count


def held_weakly(one: object, own: int = 0) -> bool:
    """Whether anybody has a weak reference to ``one``, and so gets at it without holding it meanwhile.

    ``own`` are those of the caller. Of others, those with a callback of this package or of torch's compiler
    do not count: they are there to notice its end, or to count modules, and lead nobody to it.
    """
    if weakref.getweakrefcount(one) <= own:
        return False
    found = weakref.getweakrefs(one)
    if any(isinstance(reference, weakref.ProxyTypes) for reference in found):
        return True
    calls = (reference.__callback__ for reference in found)
    return not all((getattr(call, "__module__", None) or "").startswith(_LEAD_NOBODY) for call in calls)


_LEAD_NOBODY = (f"{__name__.partition('.')[0]}.", "torch._dynamo.")


def holds_alone(module: nn.Module, stock: tuple[nn.Module], name: str) -> bool:
    """Whether only ``module`` and the one that it stands for hold its parameter ``name``, and its memory.

    The two share the dictionary of parameters. To be asked as :func:`held_elsewhere`.
    """
    if module_held_elsewhere(stock, 0, 1, module):
        return False
    if held_elsewhere(vars(module), "_parameters", holders=2):
        return False
    return _is_held_alone(module._parameters, name)


def holds_layer_alone(children: dict[str, Any], stock: tuple[nn.Module], name: str) -> bool:
    """Whether only a block with these ``children``, and the one that it stands for, hold a linear layer.

    Or its weight, or the memory of that. To be asked likewise.
    """
    if held_elsewhere(stock, 0) or module_held_elsewhere(children, name, 2):
        return False
    if held_elsewhere(vars(children[name]), "_parameters"):  # as an iterator over it does
        return False
    return _is_held_alone(children[name]._parameters, "weight")


def _is_held_alone(parameters: dict[str, Any], name: str) -> bool:
    """Whether nobody but this dictionary holds a parameter, or its memory; to be asked likewise."""
    if held_elsewhere(parameters, name):
        return False
    if int8_of(parameters[name]) is None:
        return shares_nothing(parameters[name])
    inner = vars(parameters[name])
    return not held_elsewhere(inner, "qdata") and shares_nothing(inner["qdata"])


def _uses(storage: torch.UntypedStorage) -> int | None:
    # Not public. A torch without it cannot tell, and then nothing is lent.
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else count(storage._cdata)


_lone = {"tensor": torch.empty(1)}
_USES_ALONE = _uses(_lone["tensor"].untyped_storage()) or -1
_REFERENCES_ALONE = sys.getrefcount(_lone["tensor"])


_in_files: dict[int, tuple[StorageWeakRef, int, bool]] = {}
"""Of storages, by identity, which lasts while somebody refers to it: the address, and what was found."""


def _lies_in_a_file(storage: torch.UntypedStorage) -> bool:
    # Asked for every token; to look takes as long as a small layer.
    key, address = storage._cdata, storage.data_ptr()
    known = _in_files.get(key)
    if known is None or known[1] != address:
        for gone in [one for one, (reference, *_) in list(_in_files.items()) if reference.expired()]:
            _in_files.pop(gone, None)
        _in_files[key] = known = (StorageWeakRef(storage), address, _is_of_a_file(address))
    return known[2]


def _is_of_a_file(address: int) -> bool:
    """Whether a file is mapped to ``address``, and not shared with whoever writes to it."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                addresses, permissions, *rest = line.split(maxsplit=5)
                first, last = (int(one, 16) for one in addresses.split("-"))
                if first <= address < last:
                    return permissions.endswith("p") and rest[-1].startswith("/")
    except OSError:  # no such file on this system
        pass
    return False
