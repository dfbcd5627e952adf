"""Whether anything was skipped: equal outputs alone cannot tell, since dense gives them too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import triton_ops  # noqa: F401 (defines the operators)

# By operator, where the int8 rows of a certificate stand among its arguments.
_OPERATORS = {
    torch.ops.hf_sparse.gated_mlp.default: 7,
    torch.ops.hf_sparse.plain_mlp.default: 5,
    torch.ops.hf_sparse.sparse_linear.default: None,
    torch.ops.hf_sparse.routed_mlp.default: None,
}


class CountSkips(TorchDispatchMode):
    """Calls of the skipping operators inside the ``with`` block: all, and those with a certificate."""

    count = 0
    certified = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATORS:
            self.count += 1
            place = _OPERATORS[func]
            self.certified += place is not None and args[place] is not None
        return func(*args, **(kwargs or {}))
