"""Modules of which PEFT keeps several copies in one place: ``modules_to_save``.

The wrapper that PEFT puts there holds the original and one trained copy for each adapter; its forward calls
one of them. Which one, it is asked by its public attributes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_WRAPPED = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+|base_layer)(?=\.|$)")


def place(name: str) -> str:
    """The qualified name of a module in the model as it was before PEFT wrapped its parts."""
    return _WRAPPED.sub("", name)


def in_use(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``module`` that its forward can reach now: ``named_modules`` without idle copies."""
    yield from _walk(module, name, set())


def idle(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The rest of ``named_modules``: copies that are not called until another adapter is made active."""
    used = {id(one) for _, one in in_use(module)}
    for name, one in module.named_modules():
        if id(one) not in used:
            yield name, one


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    chosen = _chosen(module)
    for child_name, child in module.named_children() if chosen is None else [chosen]:
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


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
