"""The configuration of a way to perturb the weights: what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from hf_sparse.fields import check_types, require
from hf_sparse.sharpness.chosen import choose
from hf_sparse.sharpness.masks import Masks
from hf_sparse.sharpness.part import Part

if TYPE_CHECKING:
    from hf_sparse.sharpness.perturbation import Perturbation


@dataclass(frozen=True, kw_only=True)
class SharpnessConfig(ABC):
    """What is perturbed, and how far: a frozen dataclass of JSON types, checked when it is made.

    Raises:
        ValueError: names the field, its value and the mend.

    """

    name: ClassVar[str]

    rho: float = 0.05
    """L2 norm of the perturbation before a mask leaves out entries of it, in units of the weights."""

    include: list[str] = field(default_factory=list)
    """Patterns (fnmatch) of parameters to perturb, or of modules that hold them, such as ``*.mlp``; empty
    means all. The norm of the gradient is over these alone."""

    exclude: list[str] = field(default_factory=list)
    """Patterns of parameters or modules to leave alone."""

    def __post_init__(self) -> None:
        check_types(self, "sharpness.")
        require(
            self.rho > 0, "sharpness.rho", self.rho, "it must be positive; leave sharpness out to do without"
        )
        for name in ("include", "exclude"):
            self._require(all(getattr(self, name)), name, "a pattern cannot be empty")

    def build(
        self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None, steps: int | None = None
    ) -> Perturbation:
        """The perturbation of the weights that ``optimizer`` trains, to be used in a loop.

        ``model`` is as it is trained: wrapped by DDP or sharded by FSDP2 already. It gives the names for
        patterns and saved masks; without it they are those of the optimizer's groups, or numbers. ``steps``
        is the number of updates in the whole run, for what has a schedule.

        Raises:
            ValueError: the patterns do not fit, or the way of sharding does not (DeepSpeed, FSDP1).

        """
        from hf_sparse.sharpness.perturbation import Perturbation

        parts = choose(optimizer, model, self.include, self.exclude)
        return Perturbation(optimizer, model, parts, self.rho, self.masks(parts, steps))

    @abstractmethod
    def masks(self, parts: Sequence[Part], steps: int | None) -> Masks:
        """Which entries of ``parts`` are perturbed in a run of ``steps`` updates.

        Raises:
            ValueError: the method cannot be used for them.

        """

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, that :func:`hf_sparse.sharpness.read` takes."""
        return {"name": self.name, **asdict(self)}

    def _require(self, ok: bool, field: str, mend: str) -> None:
        require(ok, f"sharpness.{field}", getattr(self, field), mend)

    def _require_share(self, field: str) -> None:
        self._require(0 < getattr(self, field) <= 1, field, "it must be a share above 0, at most 1")

    def _require_at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= least, name, f"it must be at least {least}")
