"""The section of a saved model's README that says what the model is, and which runtimes get it wrong."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from torch import nn

from hf_sparse.checkpoint_block import has
from hf_sparse.composite import nested
from hf_sparse.patch_report import PatchReport
from hf_sparse.patching import inspect, transformers_model
from triton_ops.storage import write_atomically

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
    path = Path(folder) / "README.md"
    found = path.is_file()
    # Whatever its encoding and line ends: what is not ours goes through unchanged.
    old = path.read_bytes().decode("utf-8", "surrogateescape") if found else _NEW
    rest = _SECTION.sub("\n", old, count=1)
    configs = nested(transformers_model(model).config).values()
    if any(map(has, configs)) and (report := inspect(model)).patched:
        new = f"{rest.rstrip()}\n\n{_section(report)}"
        if new != old:
            write_atomically(path, new.encode("utf-8", "surrogateescape"))  # all processes may be at it
        return path
    if rest != old:
        if rest.strip() == _NEW.strip():
            path.unlink()
            return None
        write_atomically(path, rest.encode("utf-8", "surrogateescape"))
    return path if found else None


def _section(report: PatchReport) -> str:
    # What another tool does to the model in this process is no part of the checkpoint.
    text = "\n".join(str(replace(part, others=())) for part in report.patched)
    summary = "\n".join(line for line in text.splitlines() if not line.startswith("  WARNING"))
    return f"""{_BEGIN}
## Sparse activations

The MLP blocks of this model were changed with the Python package `hf_sparse`:

```text
{summary}
```

| runtime | this model |
|---|---|
{chr(10).join(f"| {where} | {what} |" for where, what in _runtimes(report))}
{_END}
"""


def _runtimes(report: PatchReport) -> list[tuple[str, str]]:
    patched = report.patched
    original = " and ".join(sorted({one.original_activation or "the original activation" for one in patched}))
    ignores = f"**wrong without an error**: computes `{original}`"
    plain, older = "right, computes all neurons", None
    if any(one.stock_name is None for one in patched):
        named = any(one.stock_name is None and one.field is not None for one in patched)
        plain = "refuses to load it: `KeyError: 'hf_sparse'`"
        if not named:
            plain, older = (
                "from version 5 on refuses to load it: `ValueError: Unknown fusion type: hf_sparse`",
                ignores,
            )
    rows = [
        ("transformers, after `import hf_sparse`", "right, and skips silent neurons when it decodes"),
        ("transformers alone", plain),
    ]
    if older:
        rows.append(("transformers 4 alone", f"{older}; its config has no field that could say otherwise"))
    if all(one.stock_name == one.original_activation for one in patched):  # which every runtime knows
        return [*rows, ("any other", "as the original model")]
    return [
        *rows,
        ("vLLM", "refuses it for Llama-like models"),
        (
            "llama.cpp and what is built on it",
            f"{ignores}; the converter ignores the config's activation for Llama-like models",
        ),
        (
            "Liger kernels (`use_liger_kernel`), kernels of the Hub (`use_kernels`)",
            f"{ignores} where they replace the MLPs",
        ),
        ("any other", "compare its logits with those of transformers before use"),
    ]
