"""Docstrings as the site wants them: the roles of Sphinx become links within the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

import website.names

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Writes ``:func:`patch``` as a link if the API pages have it, else as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that was read."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(_linked, obj.docstring.value)


def _linked(match: re.Match[str]) -> str:
    name = match[1]
    target = website.names.documented().get(name.rpartition(".")[2])
    return f"[`{name}`][{target}]" if target and name in (target, target.rpartition(".")[2]) else f"`{name}`"
