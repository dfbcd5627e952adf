"""Writes docs/coverage.md: which model types hf_sparse patches, found out by trying.

    python tests/coverage_page.py            # write it anew
    python tests/coverage_page.py --check    # exit status 1 if it is not what the models say

It builds a tiny model of every type, which takes about a quarter of a minute. The page is held to the same by
tests/hf_sparse/test_coverage.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from support.coverage import Coverage, coverage
from support.every_type import DECODERS, FAMILIES, NOT_BUILT, model_types

PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"

HEAD = """# Coverage of model types

<!-- Written by tests/coverage_page.py: run it anew and change nothing here. -->

Of the {count} decoder-only text types of transformers {version} that have an FFN, `hf_sparse.patch` patches
**{some:.0%}** ({some_count}), and **every FFN** in **{every:.0%}** ({every_count}).

Each type was tried on a tiny model with the fewest layers that show every kind that the type has. FFNs are
counted by their weights and not by what hf_sparse recognises; all experts behind one router are one FFN. What
is not patched stays as it is. Of a model made of several, all parts count; those beside the language part are
patched with `part=`. [patching.md](patching.md#what-is-recognised) says how blocks are recognised.

## What is left

| In decoder-only text types, FFNs with | Types |
|---|---|
{reasons}
"""
TABLE = """
## {family}

| Type | Patched | Shapes | Left, and why |
|---|---|---|---|
{rows}
"""


def page(found: Sequence[Coverage]) -> str:
    """The text of docs/coverage.md."""
    text = _head([one for one in found if one.kind.family == DECODERS and one.every])
    for family in (DECODERS, *FAMILIES):
        rows = [one.row() for one in sorted(found, key=lambda c: c.kind.name) if one.kind.family == family]
        text += TABLE.format(family=family, rows="\n".join(rows))
    missing = "\n".join(f"- {name}: {reason}." for name, reason in NOT_BUILT.items())
    return f"{text}\n## Not tried\n\n{missing}\n"


def _head(decoders: Sequence[Coverage]) -> str:
    some = sum(bool(one.patched) for one in decoders)
    every = sum(one.whole for one in decoders)
    types = Counter(reason for one in decoders for reason in {left.reason for left in one.left})
    reasons = sorted(types.items(), key=lambda item: (-item[1], item[0]))
    return HEAD.format(
        count=len(decoders),
        version=transformers.__version__,
        some=some / len(decoders),
        some_count=some,
        every=every / len(decoders),
        every_count=every,
        reasons="\n".join(f"| {reason} | {count} |" for reason, count in reasons),
    )


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; is the page current?")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    text = page([coverage(kind, kind.build()) for kind in model_types().values()])
    if check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/coverage.md is not current: python tests/coverage_page.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
