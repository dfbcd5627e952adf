"""Tables of Markdown, as the written reports and model cards have them."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A pipe table, the first column aligned left and all others right, as numbers are, unless it has words.

    Args:
        head: the titles of the columns.
        rows: cells by row, as Markdown; a ``|`` in one has to be escaped.
        words: whether all columns are aligned left.

    """
    rule = ["---", *["---" if words else "---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
