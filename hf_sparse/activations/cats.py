"""CATS: the model's own activation, without its small values."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse.errors import PatchError

if TYPE_CHECKING:
    from hf_sparse.adapters import Block


class CATS(nn.Module):
    """``a if |a| >= threshold else 0`` with ``a = own(p)`` (CATS, arXiv 2404.08763). Elementwise; keeps NaN.

    With threshold 0 it is ``own``, bit for bit. The gradient is that of ``own`` where it is kept and 0
    elsewhere; the jumps at the threshold have none.
    """

    of: ClassVar[str]
    """The name of the model's own activation."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def own(self, p: Tensor) -> Tensor:
        """The model's activation."""
        raise NotImplementedError

    def forward(self, p: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        a = self.own(p)
        return a.masked_fill(a.abs() < self.threshold, 0)

    def compared(self, p: Tensor) -> Tensor:
        """What is silent below the threshold, ``|own(p)|``."""
        return self.own(p).abs()

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class CATSSiLU(CATS):
    """:class:`CATS` of SiLU."""

    of = "SiLU"

    def own(self, p: Tensor) -> Tensor:
        return F.silu(p)


class CATSGELU(CATS):
    """:class:`CATS` of GELU."""

    of = "GELU"

    def own(self, p: Tensor) -> Tensor:
        return F.gelu(p)


class CATSGELUTanh(CATS):
    """:class:`CATS` of GELU as it is approximated with tanh."""

    of = "GELU (tanh)"

    def own(self, p: Tensor) -> Tensor:
        return F.gelu(p, approximate="tanh")


CLASSES: dict[str, type[CATS]] = {
    "cats_silu": CATSSiLU,
    "cats_gelu": CATSGELU,
    "cats_gelu_tanh": CATSGELUTanh,
}
"""By their names in a config."""


def check_own(name: str, block: Block) -> None:
    """Refuse the activation ``name``, if it is one of :data:`CLASSES`, for a block whose own is another one.

    Compared by value, for transformers has many classes for GELU (``gelu_new``, ``gelu_fast``, ...); to 1e-6,
    where GELU and its approximation differ by 5e-4.

    Raises:
        PatchError: the message says which name fits.

    """
    if name not in CLASSES:
        return
    if (fits := fitting(block)) != name:
        raise PatchError(
            f"activation.name={name!r} keeps the large values of {CLASSES[name].of}, but {block.name} has "
            f'{type(block.original_activation).__name__}: use "{fits}".'
        )


def fitting(block: Block) -> str:
    """The name of the one for the activation that ``block`` came with.

    Raises:
        PatchError: there is none.

    """
    act = block.original_activation
    name = next((one for one, kind in CLASSES.items() if _same(act, kind(0.0))), None)
    if name is None:
        raise PatchError(
            f'{block.name} has {type(act).__name__}: CATS is for SiLU and GELU; use another, such as "relu".'
        )
    return name


@torch.no_grad()
def _same(theirs: nn.Module, ours: nn.Module) -> bool:
    if next(theirs.parameters(), None) is not None:
        return False
    # Not where or as what a context builds its tensors now: a skeleton's are on the meta device.
    p = torch.linspace(-12, 12, 97, device="cpu").to("cpu", torch.float64)
    return torch.allclose(theirs(p), ours(p), rtol=1e-6, atol=1e-6)
