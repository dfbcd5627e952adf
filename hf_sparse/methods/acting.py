"""Several methods at work on one model, driven as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hf_sparse.methods.method import Acting, Method, Term, Training
from hf_sparse.metrics import SparsityReport


def require_together(methods: Sequence[Method]) -> None:
    """Refuse methods that cannot act on one model.

    Raises:
        ValueError: names two of them, and the mend.

    """
    given = {method.name for method in methods}
    for one in methods:
        if both := [name for name in one.excludes if name in given]:
            raise ValueError(f"methods: {one.name} and {both[0]} cannot act together; leave one of them out.")
        if both := [name for name in one.beside if name in given]:
            mend = one.beside[both[0]]
            raise ValueError(f"methods: {one.name} and {both[0]} cannot act together so; {mend}.")


class ActingTogether(Acting):
    """What the methods of one training do, in their order, but for those that act first.

    Raises:
        ValueError, PatchError: one of them cannot be attached, or not beside another; then none is.

    """

    def __init__(self, methods: Iterable[Method], training: Training) -> None:
        self._acting: dict[str, Acting] = {}
        ordered = sorted(methods, key=lambda method: not method.acts_first)
        require_together(ordered)
        with ExitStack() as undo:
            for method in ordered:
                acting = method.attach(training)
                undo.callback(acting.detach)
                self._acting[method.name] = acting
            undo.pop_all()

    def before_step(self, step: int) -> None:
        for acting in self._acting.values():
            acting.before_step(step)

    def before_perturbed(self, step: int) -> None:
        for acting in self._acting.values():
            acting.before_perturbed(step)

    def task_weight(self, step: int) -> float:
        return math.prod(acting.task_weight(step) for acting in self._acting.values())

    def loss(self, step: int, batch: Mapping[str, Tensor], output: Any) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        for acting in self._acting.values():
            terms |= acting.loss(step, batch, output)
        return terms

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for acting in self._acting.values():
            acting.after_step(step)

    def after_evaluation(self, step: int, report: SparsityReport) -> None:
        for acting in self._acting.values():
            acting.after_evaluation(step, report)

    def finish(self) -> None:
        for acting in self._acting.values():
            acting.finish()

    def values(self) -> dict[str, float]:
        return {name: value for acting in self._acting.values() for name, value in acting.values().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: state for name, acting in self._acting.items() if (state := acting.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if unknown := sorted(state.keys() - self._acting.keys()):
            raise ValueError(
                f"the state is of methods that are not at work: {', '.join(unknown)}; attach those that it "
                "was saved with."
            )
        for name, own in state.items():
            self._acting[name].load_state_dict(own)

    def detach(self) -> None:
        for acting in reversed(self._acting.values()):
            acting.detach()
