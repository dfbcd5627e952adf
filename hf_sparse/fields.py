"""Checks of the fields of a dataclass against their annotations and ranges."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from typing import Any, Literal

from hf_sparse.checks import shown


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse fields of a dataclass that are not of their annotated types; ints are floats as well.

    Raises:
        ValueError: names the field, with ``prefix`` before it, its value and the mend.

    """
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        if hints[field.name] is not Any:
            _check(f"{prefix}{field.name}", getattr(config, field.name), hints[field.name])


def require(ok: bool, name: str, value: Any, mend: str) -> None:
    """Refuse a value.

    Raises:
        ValueError: ``ok`` is false.

    """
    if not ok:
        raise ValueError(f"{name}={shown(value)} cannot be used: {mend}.")


def _check(name: str, value: Any, hint: Any, more: str = "") -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        mend = f"choose one of {', '.join(map(str, arguments))}"
        require(type(value) in map(type, arguments) and value in arguments, name, value, mend + more)
    elif origin is list:
        require(isinstance(value, list), name, value, f"it must be a list{more}")
        for item in value:
            _check(name, item, arguments[0])
    elif origin is dict:
        require(isinstance(value, dict), name, value, f"it must be a mapping{more}")
    elif origin is types.UnionType:
        if value is not None:
            _check(name, value, arguments[0], ", or none")
    elif hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(number, name, value, f"it must be a finite number{more}")
    elif hint is int:
        require(type(value) is int, name, value, f"it must be a whole number{more}")
    else:
        kind = "text" if hint is str else f"of type {hint.__name__}"
        require(isinstance(value, hint), name, value, f"it must be {kind}{more}")
