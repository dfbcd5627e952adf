"""The weights, moved to where the loss is higher, for a second look at the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.fields import require
from hf_sparse.sharpness.chosen import trained
from hf_sparse.sharpness.fisher import sum_of_squares
from hf_sparse.sharpness.masks import Masks
from hf_sparse.sharpness.part import Part, total
from hf_sparse.sharpness.saving import load_state, save_state

TINY = 1e-12
"""Added to the norm of the gradient, so that a gradient of 0 perturbs nothing."""


class Perturbation:
    """Sharpness-aware minimisation for a training loop; made by :meth:`SharpnessConfig.build`.

    An update, with ``gradients`` doing forward and backward of the whole batch, in however many pieces::

        gradients()
        with perturbation.perturbed():
            optimizer.zero_grad()
            gradients()
        optimizer.step()

    Inside, the weights are ``w + rho g / (|g|_2 + 1e-12) * mask``, with g the gradient that they had, and its
    norm over all parameters that are chosen, of sharded ones over all shards. Afterwards they are w again,
    bit for bit, whatever happened inside: a copy of the perturbed parameters is kept meanwhile, and takes as
    much memory as they do. The second gradient stays, and is what the optimizer steps with.

    Micro-batches have to be the same in both passes. Clip the second gradient; clipping the first changes
    only its scale, which the norm takes out.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None,
        parts: Sequence[Part],
        rho: float,
        masks: Masks,
    ) -> None:
        self._optimizer, self._model, self._parts, self._rho, self._masks = (
            optimizer,
            model,
            parts,
            rho,
            masks,
        )
        self._trained = trained(optimizer)
        self._step, self._samples_due = 0, 0

    @contextmanager
    def perturbed(self, scale: float = 1.0) -> Iterator[None]:
        """The weights perturbed along the gradients that they now have, until the end of the block.

        ``scale`` is what the gradients were multiplied by: ``scaler.get_scale()`` of a ``GradScaler``, which
        is not to unscale them before. If a gradient is not finite, the weights stay as they are: the second
        pass then meets the same overflow, and the scaler leaves the update out.

        Raises:
            RuntimeError: there is no gradient, ``update_mask`` was due, or the optimizer now trains others.

        """
        require(scale > 0 and math.isfinite(scale), "scale", scale, "it must be positive and finite")
        self._check()
        self._step += 1
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                self._perturb([part.gradient() for part in self._parts], scale, saved)
            torch.clear_autocast_cache()  # which would hold the weights as they were, in low precision
            yield
        finally:
            with torch.no_grad():
                for weight, value in saved:
                    weight.copy_(value)
            torch.clear_autocast_cache()
        self._samples_due = self._masks.samples_due(self._step)

    @property
    def samples_due(self) -> int:
        """So many samples, over all processes, :meth:`update_mask` now needs; 0 at most times."""
        return self._samples_due

    def update_mask(
        self, gradient: Callable[[dict[str, Tensor]], object], batch: Mapping[str, Tensor]
    ) -> None:
        """Make new masks from the gradients of single samples (SSAM-F), after the optimizer's step.

        ``batch`` has tensors ``[N, ...]``, the samples of this process, which make ``samples_due`` over all
        processes. ``gradient`` does forward and backward of one of them, given as a mapping of tensors
        ``[1, ...]``; under FSDP2 every process goes through the samples of all. The parameters' gradients are
        afterwards what they were. If one of a sample is not finite, the masks stay.

        Raises:
            ValueError: it is another number of samples, or the model is not seen to be wrapped by DDP.

        """
        fisher = sum_of_squares(gradient, batch, self._samples_due, self._parts, self._trained, self._model)
        with torch.no_grad():
            if math.isfinite(total([value.sum() for value in fisher], self._parts)):
                self._masks.update(fisher)
        self._samples_due = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, and under ``masks`` a bool tensor for each parameter, by name.

        A mask is a DTensor where its parameter is one, and a scalar if all or nothing is perturbed.
        """
        return {"step": self._step, "samples_due": self._samples_due, "masks": self._masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave; masks may be whole where parameters are sharded.

        Raises:
            ValueError: it is of other parameters; then nothing was changed.

        """
        self._masks.load_state_dict(state["masks"])
        self._step, self._samples_due = int(state["step"]), int(state["samples_due"])

    def save(self, path: Path | str) -> None:
        """Write :meth:`state_dict` to one safetensors file, from the first process; all have to call.

        The masks of sharded parameters are gathered one by one, so any number of processes can load the file.
        """
        save_state(self.state_dict(), Path(path))

    def load(self, path: Path | str) -> None:
        """Continue from what :meth:`save` wrote, which every process reads.

        Raises:
            ValueError: it is of other parameters; then nothing was changed.

        """
        self.load_state_dict(load_state(Path(path)))

    def _check(self) -> None:
        now = trained(self._optimizer)
        if len(now) != len(self._trained) or any(a is not b for a, b in zip(now, self._trained, strict=True)):
            raise RuntimeError(
                "the optimizer trains other parameters than when the sharpness was built; build anew."
            )
        if all(part.parameter.grad is None for part in self._parts):
            raise RuntimeError(
                "no parameter to perturb has a gradient: call backward first, and zero_grad inside."
            )
        if self._samples_due:
            raise RuntimeError(
                f"update_mask was to be given {self._samples_due} samples after update {self._step}."
            )

    def _perturb(
        self, gradients: Sequence[Tensor | None], scale: float, saved: list[tuple[Tensor, Tensor]]
    ) -> None:
        norm = _norm(gradients, self._parts) / scale
        if not math.isfinite(norm):
            return
        self._masks.before(self._step, gradients)
        factor = self._rho / (norm + TINY) / scale
        todo = [
            (part.local(), gradient, mask)
            for part, gradient, mask in zip(self._parts, gradients, self._masks.values, strict=True)
            if gradient is not None and mask is not False
        ]
        saved += [(weight, weight.clone()) for weight, _, _ in todo]
        for weight, gradient, mask in todo:
            weight.add_(gradient if mask is True else gradient * mask, alpha=factor)
        self._masks.after(self._step, gradients)


def _norm(tensors: Sequence[Tensor | None], parts: Sequence[Part]) -> float:
    """The L2 norm of local tensors over all of them and all processes."""
    squares = []
    for tensor, part in zip(tensors, parts, strict=True):
        of = torch.zeros((), device=part.local().device) if tensor is None else tensor
        squares.append(torch.linalg.vector_norm(of, dtype=torch.float32).square())
    return math.sqrt(float(total(squares, parts)))
