"""Cases in which every two values meet: mistakes that take three at once are left to random tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def pairs(*dimensions: Sequence[Any]) -> list[ParameterSet]:
    """A covering design of strength 2, the same every time: far fewer cases than the full product."""
    places = range(len(dimensions))
    left = {
        ((i, a), (j, b))
        for i, j in combinations(places, 2)
        for a in range(len(dimensions[i]))
        for b in range(len(dimensions[j]))
    }
    cases = []
    while left:
        case = dict(min(left))
        for place in places:
            if place not in case:
                values = range(len(dimensions[place]))
                new = {v: sum(_pair((place, v), other) in left for other in case.items()) for v in values}
                turn = (len(cases) + place) % len(values)  # between equals, each in its turn
                case[place] = max(values, key=lambda v: (new[v], -((v - turn) % len(values))))
        left.difference_update(combinations(sorted(case.items()), 2))
        cases.append(_param([dimensions[place][case[place]] for place in places]))
    return cases


def _param(values: Sequence[Any]) -> ParameterSet:
    """One case, with the marks of those of its values that are a ``pytest.param``."""
    sets = [value if isinstance(value, ParameterSet) else pytest.param(value) for value in values]
    return pytest.param(*(s.values[0] for s in sets), marks=[mark for s in sets for mark in s.marks])


def _pair(one: tuple[int, int], other: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((one, other)))
