"""Stand-ins for tensors that know how they came about: what a forward makes of one is its formula.

A forward that does nothing but call children and multiply can run on these, which proves what numbers only make
likely. And it is quick: its first few operators take torch several milliseconds in each process, which
matters while a small model is loaded.
"""

from __future__ import annotations

from typing import Any, NoReturn


class Asked:
    """Whether a forward has asked for anything that a term does not have; then it proves nothing."""

    def __init__(self) -> None:
        self.anything = False


class Term:
    """The product of two terms, or what a child makes of one, as text.

    Nothing else can be done with it, nor asked: whoever asks for a shape, or whether it is a tensor, may
    compute something else with what has the one or is the other.
    """

    __slots__ = ("_asked", "_text")

    def __init__(self, text: str, asked: Asked) -> None:
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_asked", asked)

    def __mul__(self, other: object) -> Term:
        if type(other) is not Term:
            return NotImplemented
        factors = sorted((text(self), text(other)))  # the order changes no bit
        return Term(f"({factors[0]} * {factors[1]})", _asked(self))

    def _refuse(self, *_: object) -> NoReturn:
        _asked(self).anything = True
        raise TypeError("a term has no value")

    __getattribute__ = __setattr__ = __bool__ = __eq__ = __hash__ = __repr__ = __imul__ = _refuse  # type: ignore


class Child:
    """Called with a term it gives another one; it has nothing else, either."""

    __slots__ = ("_asked", "_name")

    def __init__(self, name: str, asked: Asked) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_asked", asked)

    def __call__(self, x: Any) -> Any:
        if type(x) is not Term:
            raise TypeError("not a term")
        return Term(f"{object.__getattribute__(self, '_name')!r}({text(x)})", _asked(self))

    __getattribute__ = __setattr__ = __bool__ = __eq__ = __hash__ = __repr__ = Term._refuse  # type: ignore


def text(term: Term) -> str:
    """What ``term`` is, equal for equal terms."""
    found: str = object.__getattribute__(term, "_text")
    return found


def _asked(one: object) -> Asked:
    found: Asked = object.__getattribute__(one, "_asked")
    return found
