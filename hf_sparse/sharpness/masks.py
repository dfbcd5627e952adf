"""Which entries of the parameters are perturbed; here: all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse.checks import shown
from hf_sparse.sharpness.part import Part, local
from hf_sparse.sharpness.patterns import Mask


class Masks:
    """A mask for each of ``parts``, on which all processes agree. Steps count updates from 1.

    Gradients are local, of the whole batch, in the order of ``parts``, and finite.
    """

    def __init__(self, parts: Sequence[Part], start: Mask = True) -> None:
        self.parts = parts
        self.values: list[Mask] = [start] * len(parts)

    def before(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        """Called before the perturbation of update ``step``."""

    def after(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        """Called when the masks have been used for the perturbation of update ``step``."""

    def samples_due(self, step: int) -> int:
        """How many gradients of single samples :meth:`update` needs after update ``step``."""
        return 0

    def update(self, fisher: Sequence[Tensor]) -> None:
        """Make the masks from sums of squared gradients, float32, of the local shapes."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """The masks by the names of the parameters: bool, sharded as these are; a scalar for all or none."""
        return {p.name: _like(p, mask) for p, mask in zip(self.parts, self.values, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave; tensors may be whole where parameters are sharded.

        Raises:
            ValueError: it is of other parameters; then nothing was changed.

        """
        names = {part.name for part in self.parts}
        if state.keys() != names:
            odd = sorted(state.keys() ^ names)
            raise ValueError(
                f"the saved masks are of other parameters: {shown(odd)} are in one only of masks and model. "
                "Set include, exclude and the trained parameters back to those of the run that was saved."
            )
        self.values = [_own(part, state[part.name]) for part in self.parts]


def zeros_if_none(gradient: Tensor | None, part: Part) -> Tensor:
    """The local gradient of ``part``, as numbers also where backward did not reach it."""
    return torch.zeros_like(part.local()) if gradient is None else gradient


def _like(part: Part, mask: Mask) -> Tensor:
    if isinstance(mask, bool):
        return torch.tensor(mask)
    if not part.is_sharded:
        return mask
    from torch.distributed.tensor import DTensor

    own: Any = part.parameter
    return DTensor.from_local(
        mask, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def _own(part: Part, saved: Any) -> Mask:
    own: Any = part.parameter
    if saved.dtype != torch.bool or saved.shape not in ((), own.shape):
        raise ValueError(
            f"the saved mask of {part.name!r} is {saved.dtype} of shape {tuple(saved.shape)} and not bool of "
            f"shape {tuple(own.shape)}: it belongs to another model."
        )
    if saved.ndim < own.ndim:
        return bool(saved)
    if part.is_sharded and not hasattr(saved, "placements"):
        from torch.distributed.tensor import distribute_tensor

        saved = distribute_tensor(saved.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return local(saved).to(part.local().device, copy=True)
