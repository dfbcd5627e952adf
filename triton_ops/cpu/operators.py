"""The operators of compiled graphs as functions of C++, ``operators.cpp``: a call takes no Python.

Where they cannot be built, for want of torch's headers say, graphs call the operators in Python, which do the
same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from triton_ops import advice, layout
from triton_ops.cpu import build, calls
from triton_ops.cpu.calls import kernels

SOURCE = Path(__file__).with_name("operators.cpp")
_TORCH = Path(torch.__file__).parent
_ABI = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
COMPILE = ("-O2", "-std=c++20", "-fPIC", "-w", f"-I{_TORCH / 'include'}", _ABI, build.ACTIVATIONS)
LINK = ("-shared", f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10")


KERNELS = "hfs_mlp", "hfs_linear", "hfs_linears", "hfs_attention"
"""Those of ``mlp.cpp`` that they call."""


@cache
def library() -> ctypes.CDLL | str:
    """Them, ready to be called, or the reason why graphs have to do without. The first call builds them."""
    if isinstance(found := build.library(), str):
        return found
    try:
        library = build.load(SOURCE, COMPILE, [LINK], torch.__version__)
    except build.BuildError as error:
        return str(error)
    library.hfs_connect.argtypes = [*[ctypes.c_void_p] * len(KERNELS), ctypes.c_bool]
    addresses = (ctypes.cast(getattr(kernels(), name), ctypes.c_void_p) for name in KERNELS)
    library.hfs_connect(*addresses, calls.is_forked())
    library.hfs_advise.argtypes = [ctypes.c_char_p, ctypes.c_int64]

    @contextmanager
    def unseen() -> Iterator[None]:
        try:  # a signal may be handled as soon as it is held
            library.hfs_begin_change()
            yield
        finally:
            library.hfs_end_change()

    layout.unseen, advice.tell = unseen, library.hfs_advise
    return library


def are_there() -> bool:
    """Whether graphs can have them."""
    return not isinstance(library(), str)
