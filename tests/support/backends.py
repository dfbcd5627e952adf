"""Backends with other facts about them, as on another machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import triton_ops
from triton_ops.backends import REGISTRY


def change_backend(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Replace fields of a registered backend, for the choices from now on."""
    monkeypatch.setitem(REGISTRY, name, replace(REGISTRY[name], **changes))
    triton_ops.forget()
