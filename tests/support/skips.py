"""Whether anything was skipped: equal outputs alone cannot tell, since dense gives them too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import triton_ops  # noqa: F401 (defines the operators)

_OPERATORS = (torch.ops.hf_sparse.gated_mlp.default, torch.ops.hf_sparse.sparse_linear.default)


class CountSkips(TorchDispatchMode):
    """``count``: calls of the skipping operators inside the ``with`` block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATORS:
            self.count += 1
        return func(*args, **(kwargs or {}))
