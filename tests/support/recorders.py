"""Which operators torch was asked for inside a ``with`` block."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Recording:
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def record(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Recorder(_Recording, TorchDispatchMode):
    """Those that the dispatcher got."""

    __torch_dispatch__ = _Recording.record


class FunctionRecorder(_Recording, TorchFunctionMode):
    """Those that were called from Python."""

    __torch_function__ = _Recording.record
