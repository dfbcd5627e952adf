"""What every call of the compiled kernels needs."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from triton_ops.cpu import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The threads of OpenMP do not survive a fork, and waiting for them hangs the child; it works on one instead.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


@cache
def kernels() -> Any:
    """The functions of ``mlp.cpp``, each of which takes a packed struct."""
    library = build.library()
    assert not isinstance(library, str), library  # unusable() has been asked
    for function in (
        library.hfs_mlp,
        library.hfs_linear,
        library.hfs_attention,
        library.hfs_sparse_product,
        library.hfs_sampled_product,
    ):
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_char_p]
    for function in (library.hfs_certify, library.hfs_find, library.hfs_transpose):
        function.restype = None
        function.argtypes = [ctypes.c_char_p]
    return library


def is_forked() -> bool:
    """Whether this process is a child that was forked with this package in it."""
    return _forked


def threads() -> int:
    """How many a call may use."""
    return 1 if _forked else torch.get_num_threads()


def pointer(tensor: Tensor | None) -> int:
    """Its address, 0 of None."""
    return 0 if tensor is None else tensor.data_ptr()


def no_memory(tokens: int) -> NoReturn:
    """Raise what tells it."""
    raise MemoryError(
        f"no memory is left for the intermediate values of {tokens} tokens; use fewer in one call."
    )
