"""What the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.kernel_blocks import DEVICE, INTERPRETED

# Tests of the Triton kernels on values. Without a GPU they are no part of a run, unless Triton interprets:
# it must be told so before it is first imported, so they have a run of their own, `make test-interpreter`.
if DEVICE == "cpu" and not INTERPRETED:
    collect_ignore = [f"test_gpu_{name}.py" for name in ("kernels", "certificate", "models", "trained_mlp")]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that a kernel that forgets to write a place is caught."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
