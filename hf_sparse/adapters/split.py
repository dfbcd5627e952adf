"""Modules whose parameters transformers has split between processes: it wraps the forward of the object."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def is_split(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is such a wrapper, which calls the forward that it was put around."""
    forward = vars(module).get("forward")
    return getattr(forward, "__module__", "").startswith("transformers.distributed.")


def splitting(module: nn.Module) -> tuple[Any, Any] | None:
    """The style and the device mesh by which ``module`` is split, for ``style.install_forward(other, mesh)``.

    None if it is not, or in a way that cannot be put around another module.
    """
    if not is_split(module):
        return None
    # Nothing else keeps them: plans speak of names, and may be gone.
    around = inspect.getclosurevars(vars(module)["forward"]).nonlocals
    inner = getattr(around.get("original_forward"), "__func__", None)
    if inner is not type(module).forward or not {"self", "mesh"} <= around.keys():
        return None
    return around["self"], around["mesh"]
