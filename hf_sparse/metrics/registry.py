"""The metrics by their names: each is a module of this package."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module

from hf_sparse.checks import known
from hf_sparse.metrics.metric import Metric


@cache
def metrics() -> dict[str, type[Metric]]:
    """Every metric of the package, by its name."""
    package = __name__.rpartition(".")[0]
    modules = [one.name for one in pkgutil.iter_modules(import_module(package).__path__)]
    return {cls.name: cls for module in modules for cls in _in_module(f"{package}.{module}")}


def chosen(names: Iterable[str]) -> list[type[Metric]]:
    """The metrics of these names, each once.

    Raises:
        ValueError: there is no such metric, or ``names`` is one text.

    """
    if isinstance(names, str):
        raise ValueError(f"metrics={names!r} is one text; give a list of names: [{names!r}].")
    wanted = list(dict.fromkeys(names))
    known("metrics", wanted, list(metrics()))
    return [metrics()[name] for name in wanted]


def _in_module(name: str) -> Iterator[type[Metric]]:
    for one in vars(import_module(name)).values():
        if isinstance(one, type) and issubclass(one, Metric) and one.__module__ == name and one is not Metric:
            yield one
