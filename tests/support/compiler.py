"""The compiled CPU backend in tests: everything but it must pass on a machine without a C++ compiler."""

from __future__ import annotations

import pytest

from triton_ops.cpu import build

needs_compiler = pytest.mark.skipif(isinstance(build.library(), str), reason="no working C++ compiler")
CPP = pytest.param("cpp", marks=needs_compiler)
