"""Runs the kernel tests in Triton's interpreter, which must be chosen before Triton is first imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = ("test_gpu_kernels.py", "test_gpu_certificate.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the files run on the GPU")
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(folder / f) for f in FILES)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder.parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
