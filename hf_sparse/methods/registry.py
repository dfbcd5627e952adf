"""The methods by their names: each is a module of this package."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from hf_sparse.checks import known, mapping
from hf_sparse.methods.acting import require_together
from hf_sparse.methods.method import Method


@cache
def methods() -> dict[str, type[Method]]:
    """Every method of the package, by its name."""
    package = __name__.rpartition(".")[0]
    names = [one.name for one in pkgutil.iter_modules(import_module(package).__path__)]
    found = [cls for name in names for cls in _in_module(f"{package}.{name}")]
    return {cls.name: cls for cls in found}


def read_methods(value: Any) -> list[Method]:
    """Methods from a mapping of their names to their fields, as in a recipe.

    Raises:
        ValueError: names the method or field, its value and the mend.

    """
    given: Mapping[str, Any] = mapping("methods", {} if value is None else value)
    known("methods", list(given), list(methods()))
    found = [methods()[name].read(own) for name, own in given.items()]
    require_together(found)
    return found


def _in_module(name: str) -> Iterator[type[Method]]:
    for one in vars(import_module(name)).values():
        if isinstance(one, type) and issubclass(one, Method) and one.__module__ == name and one is not Method:
            yield one
