"""Documents that cannot be used: counted, named, and left out up to a limit."""

from __future__ import annotations

import warnings

NAMED = 100
"""Warnings in one pass over the data; more are only counted."""


class BadDocuments:
    """The bad documents of one pass over the data.

    Args:
        data: the data, in words, for messages.
        field: the column that should hold the text.
        limit: how many may be left out; None means any number.

    """

    def __init__(self, data: str, field: str, limit: int | None) -> None:
        self._data, self._field, self._limit = data, field, limit
        self._any_good = False
        self._before_good: list[str] = []
        self.count = 0

    def continued(self, count: int) -> None:
        """The pass stands where ``count`` have been left out, and named."""
        self.count, self._any_good = count, True

    def good(self) -> None:
        """There is a good document, so the bad ones before it are exceptions and not the rule."""
        if not self._any_good:
            self._any_good = True
            for said in self._before_good:
                _warn(said)

    def found(self, place: str, problem: str) -> None:
        """Leave out the document at ``place``.

        Raises:
            ValueError: that is one too many.

        """
        self.count += 1
        said = f"{place} {problem}"
        if not self._any_good:
            self._before_good.append(said)
        if self._limit is not None and self.count > self._limit:
            self.ended()
            raise ValueError(
                f"more than max_bad_documents={self._limit} documents of {self._data} cannot be used; the "
                f"last: {said}. Mend the data, or raise max_bad_documents."
            )
        if self._any_good and self.count <= NAMED:
            _warn(said)
        del self._before_good[NAMED:]

    def ended(self) -> None:
        """Nothing more comes.

        Raises:
            ValueError: there were documents, but none could be used.

        """
        if self._before_good and not self._any_good:
            raise ValueError(
                f"text_field={self._field!r} is no text in {self._data}: none of {self.count:,} documents "
                f"can be used. The first: {self._before_good[0]}. Name the column that holds the text."
            )


def _warn(said: str) -> None:
    warnings.warn(f"a document is left out: {said}", RuntimeWarning, stacklevel=4)
