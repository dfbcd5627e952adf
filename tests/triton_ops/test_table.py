from __future__ import annotations

import pytest

from triton_ops.table import table

ROWS = [("name", "size", "kind"), None, ("a", "1,024", "plain"), ("longer", "8", "gated")]


def test_columns_are_as_wide_as_their_widest_cell():
    assert table(ROWS, left=(0, -1)) == (
        "name     size  kind\n--------------------\na       1,024  plain\nlonger      8  gated"
    )
    assert table([("", "b"), ("aa", "")], left=()) == "    b\naa"
    assert table([]) == ""


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        table([("a", "b"), ("c",)])
