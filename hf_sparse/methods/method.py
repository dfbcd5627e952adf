"""What a training method is: its configuration, and what it does while a model is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from hf_sparse.checks import known, mapping
from hf_sparse.fields import check_types

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig
    from hf_sparse.metrics import SparsityReport

Self = TypeVar("Self", bound="Method")


class Term(NamedTuple):
    """A term of the loss: ``weight * value`` is added, ``value`` is logged."""

    value: Tensor
    """Scalar, float32, with gradient."""
    weight: float = 1.0


@dataclass(frozen=True)
class Training:
    """What a method may know of the training that it acts in."""

    model: nn.Module
    """The bare model, patched, before it is wrapped or sharded (which exchanges its parameters)."""
    steps: int
    """Optimizer updates in the whole run; those of a resumed one are all of it, too."""
    mean: Callable[[Tensor], Tensor] = lambda value: value
    """The mean of a tensor over processes; all of them have to ask."""
    dense: Callable[[], nn.Module] | None = None
    """Loads the model as it was before the patch, in evaluation mode and on the device of training."""
    dense_loss: float | None = None
    """What the dense model has on the held-out text, in nats per token; None if it was not measured."""
    eval_every: int = 0
    """Updates between evaluations on held-out text; 0: none but before the first and after the last."""


class Acting:
    """A method at work on one model. What it does not override does nothing.

    Steps count optimizer updates from 1. Nothing here may depend on how an update is cut into micro-batches
    and processes, but up to rounding.
    """

    def before_step(self, step: int) -> None:
        """Called before the first forward of update ``step``, which need not follow the one before it."""

    def before_perturbed(self, step: int) -> None:
        """Called when the forwards of update ``step`` at the model's own weights are over, with sharpness.

        Those at perturbed weights come next, and their terms and gradients are those of the update.
        """

    def task_weight(self, step: int) -> float:
        """Factor on the loss of the task itself."""
        return 1.0

    def loss(self, step: int, batch: Mapping[str, Tensor], output: Any) -> dict[str, Term]:
        """Terms to add to the loss of one micro-batch, by the names under which they are logged.

        Each is a mean over the tokens of the micro-batch, so that the mean over equal micro-batches and
        processes is that of the whole batch. ``output`` is what the model returned for ``batch``.
        """
        return {}

    def after_step(self, step: int) -> None:
        """Called after the optimizer's update ``step``, without gradient."""

    def after_evaluation(self, step: int, report: SparsityReport) -> None:
        """Called in all processes with what held-out text gave after update ``step``; 0 is before any."""

    def finish(self) -> None:
        """Called after the last update and before the last evaluation: what the finished model still needs.

        Once, and again, on the model as it was after that update, if a finished run is continued.
        """

    def values(self) -> dict[str, float]:
        """Numbers for the log: what schedules and controllers now prescribe, the same in all processes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs and the step does not tell: JSON types, the same in all processes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""

    def detach(self) -> None:
        """Take hooks off the model. It stays as it was trained."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The configuration of a method: a frozen dataclass of JSON types, checked when it is made.

    A subclass stands in a module of ``hf_sparse.methods`` with the method's name; being there is all that a
    recipe, the command line and the callback need. Lengths are fractions of the run.
    """

    name: ClassVar[str]
    excludes: ClassVar[tuple[str, ...]] = ()
    """Names of methods that cannot act beside it."""
    acts_first: ClassVar[bool] = False
    """Whether it comes before others in each update: it sets what they look at."""
    has_teacher: ClassVar[bool] = False
    """Whether it needs the model as it was before the patch."""

    @property
    def beside(self) -> dict[str, str]:
        """Names of further methods that cannot act beside it as it is set, and what to do instead."""
        return {}

    @property
    def steered_by_evaluations(self) -> bool:
        """Whether what is learned depends on when evaluations are made."""
        return False

    def __post_init__(self) -> None:
        check_types(self, f"methods.{self.name}.")

    def check(self, sparsity: SparsityConfig | None) -> None:  # noqa: B027 - most suit every model
        """Refuse a model that the method can do nothing for; ``sparsity`` None is one that stays dense.

        Raises:
            ValueError: names the method and the mend.

        """

    @abstractmethod
    def attach(self, training: Training) -> Acting:
        """Begin to act on ``training.model``.

        Raises:
            ValueError, PatchError: the model cannot be trained this way; it is as it was.

        """

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def read(cls: type[Self], value: Any) -> Self:
        """The method from a mapping of its fields; None means all have their default.

        Raises:
            ValueError: names the field, its value and the mend.

        """
        given = mapping(f"methods.{cls.name}", {} if value is None else value)
        known(f"methods.{cls.name}", list(given), [f.name for f in fields(cls)])
        return cls(**given)
