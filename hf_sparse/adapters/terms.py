"""Stand-ins for tensors that know how they came about: what a forward makes of one is its formula.

A forward that does nothing but call children and multiply can run on these, which proves what numbers only
make likely. And it is quick: the first few operators of a process take torch several milliseconds, which
matters while a small model is loaded.
"""

from __future__ import annotations

from inspect import isroutine
from typing import Any, NoReturn

from torch import Tensor

_NEEDED = ("__new__", "__init__", "__init_subclass__", "__subclasshook__", "__torch_function__")
"""By Python to make objects and classes, and by torch to find that it has no tensor."""


class Asked:
    """Whether a forward has asked for anything that stand-ins do not have; then it proves nothing."""

    def __init__(self) -> None:
        self.anything = False


class _StandIn:
    """Whoever asks for more than it has, be it whether it is a tensor, may treat a tensor in another way."""

    __slots__ = ("_asked", "_text")

    def __init__(self, text: str, asked: Asked) -> None:
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_asked", asked)

    def _refuse(self, *_: object) -> NoReturn:
        _asked(self).anything = True
        raise TypeError("a stand-in has no value and no attributes")


for _name in dir(Tensor):  # its operators; that one is missing, Python would tell the forward and not us
    if _name.startswith("__") and _name not in _NEEDED and isroutine(getattr(Tensor, _name)):
        setattr(_StandIn, _name, _StandIn._refuse)


class Term(_StandIn):
    """The product of two terms, or what a child makes of one."""

    __slots__ = ()

    def __mul__(self, other: object) -> Term:
        if type(other) is not Term:
            _StandIn._refuse(self)
        factors = sorted((text(self), text(other)))  # the order changes no bit
        return Term(f"({factors[0]} * {factors[1]})", _asked(self))


class Child(_StandIn):
    """A child of a module, which gives a term when it is called with one."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Term:
        if kwargs or len(args) != 1 or type(args[0]) is not Term:
            _StandIn._refuse(self)
        return Term(f"{text(self)!r}({text(args[0])})", _asked(self))


def text(one: Term | Child) -> str:
    """The formula of a term: equal for equal functions. Of a child, its name."""
    found: str = object.__getattribute__(one, "_text")
    return found


def _asked(one: _StandIn) -> Asked:
    found: Asked = object.__getattribute__(one, "_asked")
    return found
