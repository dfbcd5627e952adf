"""The section of a saved model's README that says what the model is, and which runtimes get it wrong."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from hf_sparse.card_marks import PATCH, PUSHED
from hf_sparse.card_metadata import without_metadata
from hf_sparse.checkpoint_block import has
from hf_sparse.composite import nested
from hf_sparse.patch_report import PatchReport
from hf_sparse.patching import inspect, transformers_model
from triton_ops.storage import write_atomically

_NEW = """---
library_name: transformers
tags:
- hf_sparse
---
"""


def write_model_card(model: nn.Module, folder: str | os.PathLike[str], *, plain: bool = False) -> Path | None:
    """Bring the README in ``folder``, where ``model`` has been saved, in line with the model.

    What is written stands between two marks. A README that is there keeps every other byte; where there is
    none, one is made. For a model that is not patched the section is taken out, and a README that is nothing
    else is removed. What :func:`hf_sparse.push_to_hub` wrote stays for the patch that it was written for; of
    another one its measurements would be wrong, so it is taken out.

    ``plain``: what was saved does not say that it is patched, as :func:`hf_sparse.export` leaves it.

    Returns:
        the README, None if there is none.

    Raises:
        OSError: it cannot be read or written.

    """
    path = Path(folder) / "README.md"
    found = path.is_file()
    # Whatever its encoding and line ends: what is not ours goes through unchanged.
    old = path.read_bytes().decode("utf-8", "surrogateescape") if found else _NEW
    configs = nested(transformers_model(model).config).values()
    report = inspect(model) if any(map(has, configs)) else None
    if plain and report is not None and _is_stock(report):
        report = None
    new = old
    if PUSHED.found(old) is not None and (report is None or PUSHED.says_of(old) != fingerprint(report)):
        new = _without_pushed(old)
    if report is not None and report.patched:
        new = PATCH.put(new, PATCH.marked(_section(report, plain)))
        if new != old:
            write_atomically(path, new.encode("utf-8", "surrogateescape"))  # all processes may be at it
        return path
    new = PATCH.without(new)
    if new != old:
        if new.strip() == _NEW.strip():
            path.unlink()
            return None
        write_atomically(path, new.encode("utf-8", "surrogateescape"))
    return path if found else None


def fingerprint(report: PatchReport) -> str:
    """Tells patches apart: the same for models of the same MLP blocks that are patched alike."""
    said = [
        (one.part, one.config.to_dict(), [(block.name, block.intermediate_size) for block in one.blocks])
        for one in report.patched
        if one.config is not None
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _without_pushed(readme: str) -> str:
    rest = PUSHED.without(readme)
    try:
        return without_metadata(rest)
    except ValueError:  # metadata that cannot be read hold no result that counts
        return rest


def _is_stock(report: PatchReport) -> bool:
    return all(one.stock_name == one.original_activation for one in report.patched)


def _section(report: PatchReport, plain: bool = False) -> str:
    # What another tool does to the model in this process is no part of the checkpoint.
    text = "\n".join(str(replace(part, others=())) for part in report.patched)
    summary = "\n".join(line for line in text.splitlines() if not line.startswith("  WARNING"))
    rows = runtimes(report)[1:] if plain else runtimes(report)  # nothing tells this package of it, either
    return f"""## Sparse activations

The MLP blocks of this model were changed with the Python package `hf_sparse`:

```text
{summary}
```

| runtime | this model |
|---|---|
{chr(10).join(f"| {where} | {what} |" for where, what in rows)}
"""


def runtimes(report: PatchReport) -> list[tuple[str, str]]:
    """What computes a patched model how: rows of (runtime, what it makes of it)."""
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
    if _is_stock(report):  # which every runtime knows
        return [*rows, ("any other", "as the original model")]
    return [
        *rows,
        ("vLLM", "refuses it for Llama-like models"),
        (
            "llama.cpp and what is built on it",
            f"{ignores} in files of its own converter, for Llama-like models; hf_sparse.export writes others",
        ),
        (
            "Liger kernels (`use_liger_kernel`), kernels of the Hub (`use_kernels`)",
            f"{ignores} where they replace the MLPs",
        ),
        ("any other", "compare its logits with those of transformers before use"),
    ]
