"""The CPU kernels as they are compiled for machines with fewer instructions than this one."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.compiler import needs_compiler
from triton_ops.cpu import build

# Those that reach every piece of code written for some instruction set.
TESTS = "any_shape or many_tokens or infinit or same_bits or extreme or overflow or along_the_residual"


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")
@pytest.mark.parametrize(
    "without", ["-mno-avx512f", "-mno-avx512bf16", "-mno-avx512bw", "-mno-f16c -mno-avx"]
)
def test_machines_with_fewer_instructions(without, tmp_path):
    """Tests of the kernels, compiled for a smaller processor, and with NaN in memory not yet written."""
    folder = Path(__file__).parent
    # What is in question is which source is compiled; -O1 takes less than half the time of -O3.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(build.compiler())} {without} -DHFS_POISON "$@" -O1\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", TESTS),
            "--hypothesis-profile=few",
            *(
                folder / f"test_{name}.py"
                for name in ("cpu_kernels", "certificate", "dense_linear", "trained_mlp")
            ),
        ],
        capture_output=True,
        text=True,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "CXX": str(compiler),
            "HF_SPARSE_CACHE": str(tmp_path),
        },
        cwd=folder.parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
