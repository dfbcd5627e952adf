"""Sharpness-aware minimisation as an optimizer that is stepped with a closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_sparse.sharpness.registry import read


class SAM(torch.optim.Optimizer):
    """``optimizer`` with the gradient of the perturbed weights in the place of their own::

        optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=1e-4), model, rho=0.05)

        def closure():
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    For ``model``, ``steps`` and what is refused see :meth:`SharpnessConfig.build`; ``name`` and ``fields``
    are those of :func:`hf_sparse.sharpness.read`. Groups and state are those of ``optimizer``. A
    ``GradScaler`` takes no closures: with one, use :attr:`perturbation` as a context manager.

    Raises:
        ValueError: names the field, its value and the mend.

    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        name: str = "sam",
        steps: int | None = None,
        **fields: Any,
    ) -> None:
        # Not that of the base class, which would make groups and state of its own.
        self.optimizer = optimizer
        self.perturbation = read({"name": name, **fields}).build(optimizer, model, steps)
        """The perturbation, with ``samples_due`` and ``update_mask`` for SSAM-F."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what ``closure`` did at the weights as they were.

        ``closure`` clears the gradients, does forward and backward, and returns the loss. It is called twice.

        Raises:
            ValueError: there is no closure.

        """
        if closure is None:
            raise ValueError("step() of SAM needs a closure that does zero_grad, forward and backward.")
        with torch.enable_grad():
            loss = closure()
            with self.perturbation.perturbed():
                closure()
        self.optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: it would not be perturbed.

        Raises:
            RuntimeError: always.

        """
        raise RuntimeError("add the group to the optimizer before SAM is made of it.")

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer, and under ``sharpness`` that of the perturbation."""
        return {**self.optimizer.state_dict(), "sharpness": self.perturbation.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self.perturbation.load_state_dict(state_dict["sharpness"])
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "sharpness"})

    def __getattr__(self, name: str) -> Any:
        """Groups, state, defaults and hooks: those of the optimizer."""
        if name == "optimizer":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"SAM({self.optimizer!r})"
