"""The section of a saved model's README that says what the model is, and which runtimes get it wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import nn

from hf_sparse.patch_report import PatchReport
from hf_sparse.patching import inspect

_BEGIN, _END = "<!-- hf_sparse: begin, written anew with each save -->", "<!-- hf_sparse: end -->"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}\n?", re.DOTALL)
_NEW = """---
library_name: transformers
tags:
- hf_sparse
---
"""


def write_model_card(model: nn.Module, folder: str | os.PathLike[str]) -> Path | None:
    """Bring the README in ``folder``, where ``model`` has been saved, in line with the model.

    What is written stands between two marks. A README that is there keeps every other byte; where there is
    none, one is made. For a model that is not patched the section is taken out, and a README that is nothing
    else is removed.

    Returns:
        the README, None if there is none.

    Raises:
        OSError: it cannot be read or written.

    """
    report = inspect(model)
    path = Path(folder) / "README.md"
    found = path.is_file()
    # Whatever its encoding and line ends: what is not ours goes through unchanged.
    old = path.read_bytes().decode("utf-8", "surrogateescape") if found else _NEW
    rest = _SECTION.sub("\n", old, count=1)
    if report.config is not None:
        new = f"{rest.rstrip()}\n\n{_section(report)}"
    elif rest == old or rest.strip() != _NEW.strip():
        new = rest
    else:
        path.unlink()
        return None
    if report.config is None and not found:
        return None
    if new != old or not found:
        path.write_bytes(new.encode("utf-8", "surrogateescape"))
    return path


def _section(report: PatchReport) -> str:
    return f"""{_BEGIN}
## Sparse activations

The MLP blocks of this model were changed with the Python package `hf_sparse`:

```text
{report}
```

| runtime | this model |
|---|---|
{chr(10).join(f"| {where} | {what} |" for where, what in _runtimes(report))}
{_END}
"""


def _runtimes(report: PatchReport) -> list[tuple[str, str]]:
    original, stock = report.original_activation, report.stock_name
    plain = "right, computes all neurons" if stock else "refuses to load it: `KeyError: 'hf_sparse'`"
    rows = [
        ("transformers, after `import hf_sparse`", "right, and skips silent neurons when it decodes"),
        ("transformers alone", plain),
    ]
    if stock == original:  # the function of the original model, which every runtime knows
        return [*rows, ("any other", "as the original model")]
    ignores = f"**wrong without an error**: computes `{original}`"
    return [
        *rows,
        ("vLLM", "refuses it for Llama-like models"),
        (
            "llama.cpp and what is built on it",
            f"{ignores}; the converter ignores the config's activation for Llama-like models",
        ),
        (
            "Liger kernels (`use_liger_kernel`), kernels of the Hub (`use_kernels`)",
            f"{ignores}, in their MLPs",
        ),
        ("any other", "compare its logits with those of transformers before use"),
    ]
