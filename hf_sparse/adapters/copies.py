"""Modules of which PEFT keeps several copies in one place: ``modules_to_save``.

The wrapper that PEFT puts there holds the original and one trained copy for each adapter; its forward calls
one of them. Which one, it is asked by its public attributes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from torch import nn

_WRAPPED = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+|base_layer)(?=\.|$)")


def place(name: str) -> str:
    """The qualified name of a module in the model as it was before PEFT wrapped its parts."""
    return _WRAPPED.sub("", name)


def in_use(
    module: nn.Module, name: str = "", *, without: Collection[nn.Module] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``module`` that its forward can reach now: ``named_modules`` without idle copies.

    And without what is in one of ``without``.
    """
    seen = set(without)
    todo = [(name, module)]
    while todo:
        name, one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        yield name, one
        if not one._modules:
            continue
        chosen = _chosen(one)
        children = one._modules.items() if chosen is None else [chosen]
        prefix = f"{name}." if name else ""
        todo += [(prefix + key, child) for key, child in reversed(children) if child is not None]


def idle(module: nn.Module, used: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """The rest of ``named_modules``: copies that are not called until another adapter is made active.

    Args:
        module: where to look.
        used: what :func:`in_use` gives of it.

    """
    if all(_chosen(one) is None for _, one in used):
        return
    ids = {id(one) for _, one in used}
    for name, one in module.named_modules():
        if id(one) not in ids:
            yield name, one


def active(module: nn.Module) -> nn.Module:
    """The copy that ``module`` calls, if it is PEFT's wrapper of several, else itself."""
    chosen = _chosen(module)
    return module if chosen is None else chosen[1]


def copies(owner: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Where the copies of the child ``name`` are, by owner and name there; without copies, where it is."""
    child = owner._modules.get(name)
    if child is None:
        return []
    if _chosen(child) is None:
        return [(owner, name)]
    kept = child._modules["modules_to_save"]
    assert kept is not None
    return [*copies(child, "original_module"), *((kept, adapter) for adapter in kept._modules)]


def _chosen(wrapper: nn.Module) -> tuple[str, nn.Module] | None:
    """Name, relative to ``wrapper``, and module of the copy that it calls; None if it is no such wrapper."""
    parts = wrapper._modules  # as attributes, PEFT's wrappers pass them on to what they wrap
    original, copies = parts.get("original_module"), parts.get("modules_to_save")
    if original is None or not isinstance(copies, nn.ModuleDict):
        return None
    names: list[str] = getattr(wrapper, "active_adapters", [])
    if getattr(wrapper, "disable_adapters", False) or not names or names[0] not in copies:
        return "original_module", original
    return f"modules_to_save.{names[0]}", copies[names[0]]
