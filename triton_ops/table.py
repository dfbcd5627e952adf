"""Tables of plain text, as every report of the project prints them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(rows: Sequence[Sequence[str] | None], *, left: Collection[int] = (0,)) -> str:
    """Cells in columns as wide as their widest cell, two spaces apart.

    Args:
        rows: cells by row, all rows equally long; None draws a rule.
        left: the columns aligned left, -1 being the last; all others are aligned right, as numbers are.

    Raises:
        ValueError: rows differ in length.

    """
    filled = [row for row in rows if row is not None]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    leftward = {column % len(widths) for column in left} if widths else set()
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i in leftward else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(rule if row is None else line(row) for row in rows)
