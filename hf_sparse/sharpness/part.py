"""A parameter as one process holds it, whole or as a shard, and sums over all that is held of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Inputs = Literal["last", "flat", "transposed"]


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of the optimizer. All its tensors are local: of a DTensor, this process's shard."""

    name: str
    """Without what DDP, ``torch.compile`` and checkpointing put into it."""
    parameter: nn.Parameter
    inputs: Inputs = "last"
    """Where a row of inputs lies: along the last dimension, along all but the first (convolutions), or along
    the second to last (``Conv1D``, transposed experts)."""

    @property
    def is_sharded(self) -> bool:
        """Whether it is a DTensor, as FSDP2 makes them; such a one may still be whole here."""
        return hasattr(self.parameter, "placements")

    def local(self) -> Tensor:
        """Its entries, on the memory of the parameter; to be called without gradient."""
        return local(self.parameter)

    def gradient(self) -> Tensor | None:
        """Of the shape of :meth:`local`; None if backward did not reach the parameter.

        Raises:
            ValueError: it is sparse.

        """
        gradient: Any = self.parameter.grad
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            raise ValueError(
                f"the gradient of {self.name!r} is a sparse tensor, which cannot be perturbed along; "
                "make its embedding with sparse=False."
            )
        mine: Any = self.parameter
        if self.is_sharded and gradient.placements != mine.placements:
            gradient = gradient.redistribute(mine.device_mesh, mine.placements)
        return local(gradient)

    def groups(self) -> tuple[Any, ...]:
        """The process groups over which its entries are divided."""
        if not self.is_sharded:
            return ()
        own: Any = self.parameter
        return tuple(
            own.device_mesh.get_group(dim)
            for dim, placement in enumerate(own.placements)
            if not placement.is_replicate()
        )

    def positions(self, piece: slice) -> Tensor:
        """Where the entries ``piece`` of the flat local tensor lie in the flat whole one, int64.

        Raises:
            ValueError: torch does not tell, for this way of sharding.

        """
        own: Any = self.parameter
        place = torch.arange(piece.start, piece.stop, device=local(own).device)
        if not self.is_sharded:
            return place
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if any(type(placement) not in (Shard, Replicate) for placement in own.placements):
            raise ValueError(
                f"{self.name!r} is sharded as {own.placements}, for which there are no global masks; "
                "use name=sam, or shard its first dimension once (fully_shard alone)."
            )
        shape, offsets = compute_local_shape_and_global_offset(own.shape, own.device_mesh, own.placements)
        found, step = torch.zeros_like(place), 1
        for size, offset, whole in reversed(list(zip(shape, offsets, own.shape, strict=True))):
            found += (place % size + offset) * step
            place, step = place // size, step * whole
        return found


def local(tensor: Any) -> Tensor:
    """What this process holds of ``tensor``."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor


def total(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """The sum of ``values``, one of the same shape for each of ``parts``, over all processes; on the CPU.

    What every process holds whole counts once. All processes have to ask.
    """
    sums: dict[tuple[Any, ...], Tensor] = {}
    for value, part in zip(values, parts, strict=True):
        groups = part.groups()
        sums[groups] = sums[groups] + value.to(sums[groups].device) if groups in sums else value.clone()
    for groups, value in sums.items():
        for group in groups:
            torch.distributed.all_reduce(value, group=group)
    return torch.stack([value.cpu() for value in sums.values()]).sum(0)
