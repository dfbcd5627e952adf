"""The build of the CPU kernels, in fresh processes: first use, cache, and everything that can be missing."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.compiler import needs_compiler
from triton_ops.cpu import build

# Says which backend "auto" takes for one token of a large block, after checking that it computes.
USE = """
import warnings, torch, triton_ops
from triton_ops import reference
x, gate, up = torch.randn(1, 512), torch.randn(8192, 512) / 23, torch.randn(8192, 512) / 23
down = triton_ops.neuron_major_(torch.randn(512, 8192) / 90)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = triton_ops.gated_mlp(x, gate, up, down, activation="relu")
torch.testing.assert_close(y, reference.gated_mlp(x, gate, up, down, activation="relu"))
print(triton_ops.plan(gate, "gated").backend(1), len(caught), *(w.message for w in caught))
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    """The compiler of this machine in a hurry: nobody waits for the speed of what these tests build."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(build.compiler())} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def run(code: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "HF_SPARSE_BACKEND")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@needs_compiler
def test_first_use_builds_and_the_next_process_loads_the_same_file(tmp_path, compiler):
    assert run(USE, HF_SPARSE_CACHE=str(tmp_path), CXX=compiler) == "cpp 0"
    (library,) = (tmp_path / "cpu").iterdir()
    built = library.stat().st_mtime_ns
    # Without a working compiler the cached file is still found: nothing is compiled again.
    assert run(USE, HF_SPARSE_CACHE=str(tmp_path), CXX=compiler) == "cpp 0"
    assert library.stat().st_mtime_ns == built


@pytest.mark.slow
@needs_compiler
def test_processes_may_build_at_once(tmp_path, compiler):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: run(USE, HF_SPARSE_CACHE=str(tmp_path), CXX=compiler), range(2)))
    assert results == ["cpp 0", "cpp 0"]
    assert len(list((tmp_path / "cpu").iterdir())) == 1  # no temporary file stays


@pytest.mark.slow
@needs_compiler
def test_a_cache_that_cannot_be_written_costs_only_the_build(tmp_path, compiler):
    (tmp_path / "file").write_text("")
    # A folder below a file can be made by nobody, not even by root.
    assert run(USE, HF_SPARSE_CACHE=str(tmp_path / "file" / "cache"), CXX=compiler) == "cpp 0"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
@pytest.mark.slow
@needs_compiler
def test_a_read_only_cache_costs_only_the_build(tmp_path, compiler):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert run(USE, HF_SPARSE_CACHE=str(tmp_path), CXX=compiler) == "cpp 0"


@pytest.mark.slow
def test_without_a_compiler_one_warning_names_the_reason_and_the_fallback(tmp_path):
    said = run(USE, HF_SPARSE_CACHE=str(tmp_path), PATH=str(tmp_path))
    assert said.startswith("torch 1 The compiled CPU kernels are not available: no C++ compiler was found")
    assert "falls back to PyTorch operators" in said


@pytest.mark.slow
def test_a_compiler_that_does_not_exist_is_named(tmp_path):
    said = run(USE, HF_SPARSE_CACHE=str(tmp_path), CXX="/nowhere/g++")
    assert said.startswith("torch 1")
    assert "CXX='/nowhere/g++' is not an executable" in said


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "fatal error: no headers" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    said = run(USE, HF_SPARSE_CACHE=str(tmp_path / "cache"), CXX=str(broken))
    assert said.startswith("torch 1")
    assert "failed with status 1: fatal error: no headers" in said


@pytest.mark.slow
def test_small_blocks_need_no_compiler_and_say_nothing(tmp_path):
    code = USE.replace("8192", "64")
    assert run(code, HF_SPARSE_CACHE=str(tmp_path), PATH=str(tmp_path)) == "dense 0"


@pytest.mark.slow
def test_forced_without_a_compiler_is_an_error_with_the_reason(tmp_path):
    code = USE.replace("    for _ in range(3):", "    for _ in range(1):")
    clean = {
        **os.environ,
        "HF_SPARSE_CACHE": str(tmp_path),
        "PATH": str(tmp_path),
        "HF_SPARSE_BACKEND": "cpp",
    }
    clean.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=False
    )
    assert (
        "RuntimeError: backend 'cpp' was forced but cannot run here: no C++ compiler was found" in done.stderr
    )


@pytest.mark.slow
@needs_compiler
def test_a_forked_child_can_use_the_kernels_after_its_parent_did():
    code = """
import os, torch, triton_ops
torch.set_num_threads(2)
down = triton_ops.neuron_major_(torch.randn(64, 999))
gate, up = torch.randn(999, 64), torch.randn(999, 64)
inputs = torch.randn(1, 64), torch.randn(40, 64)
with triton_ops.backend("cpp"):
    results = [triton_ops.gated_mlp(x, gate, up, down, activation="relu") for x in inputs]
    child = os.fork()
    if child == 0:
        again = [triton_ops.gated_mlp(x, gate, up, down, activation="relu") for x in inputs]
        os._exit(0 if all(map(torch.equal, again, results)) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == "0"


@needs_compiler
@pytest.mark.slow
def test_a_call_while_the_interpreter_ends():
    code = """
import atexit, torch, triton_ops
torch.set_num_threads(2)
down = triton_ops.neuron_major_(torch.randn(64, 999))
gate, up, x = torch.randn(999, 64), torch.randn(999, 64), torch.randn(1, 64)
def call():
    with triton_ops.backend("cpp"):
        return triton_ops.gated_mlp(x, gate, up, down, activation="relu")
expected = call()
atexit.register(lambda: print(torch.equal(call(), expected)))
"""
    assert run(code) == "True"
