"""The sparse model learns the next-token distributions of the dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_sparse.fields import require
from hf_sparse.methods.method import Acting, Method, Term, Training
from hf_sparse.methods.teacher import Precision, load_teacher
from hf_sparse.objectives import kl_divergence

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig

_NOT_OF_THE_TEACHER = ("labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True, kw_only=True)
class Distillation(Method):
    """Forward and reverse KL from the dense model, over the tokens that the loss of the task is over.

    Half of each and no other loss is what CWIC trains with (``crystal-ai-org/cwic``); forward KL at a
    temperature beside the task's loss is the distillation of Hinton et al. (arXiv 1503.02531). The teacher is
    held whole in every process, also where the student is sharded.
    """

    name = "distillation"
    has_teacher = True

    task: float = 0.0
    """Weight of the loss of the task."""

    forward_kl: float = 0.5
    """Weight of KL(teacher || student)."""

    reverse_kl: float = 0.5
    """Weight of KL(student || teacher)."""

    temperature: float = 1.0
    """Divides the logits of both; the divergences are multiplied by its square."""

    teacher_dtype: Precision = "float32"
    """Of the teacher's parameters; bfloat16 takes half the memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("task", "forward_kl", "reverse_kl"):
            value = getattr(self, name)
            require(value >= 0, f"methods.distillation.{name}", value, "it must be at least 0")
        any_kl = self.forward_kl + self.reverse_kl > 0
        require(any_kl, "methods.distillation.forward_kl", 0, "it or reverse_kl must be more than 0")
        temperature = self.temperature
        require(temperature > 0, "methods.distillation.temperature", temperature, "it must be positive")

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.distillation has no meaning with patch=none: the dense model is its own teacher. "
                "Leave it out, or choose an activation."
            )

    def attach(self, training: Training) -> Acting:
        return _Acting(self, load_teacher(training, self.name, self.teacher_dtype))


class _Acting(Acting):
    def __init__(self, method: Distillation, teacher: nn.Module) -> None:
        self._method, self._teacher = method, teacher

    def task_weight(self, step: int) -> float:
        return self._method.task

    def loss(self, step: int, batch: Mapping[str, Any], output: Any) -> dict[str, Term]:
        student = getattr(output, "logits", None)
        if student is None:
            raise ValueError(
                "methods.distillation: the model's output has no logits, as when a trainer fuses the LM head "
                "with its loss. Turn that off (TRL's SFTTrainer: pass a compute_loss_func)."
            )
        aligned = bool(getattr(self._teacher.config, "is_encoder_decoder", False))
        # An encoder-decoder makes the input of its decoder from labels.
        left_out = _NOT_OF_THE_TEACHER[1 if aligned else 0 :]
        inputs = {name: value for name, value in batch.items() if name not in left_out}
        with torch.no_grad():
            teacher = self._teacher(**{**inputs, "use_cache": False}).logits
        method = self._method
        value = kl_divergence(
            student,
            teacher,
            _counted(batch, student, aligned=aligned),
            forward=method.forward_kl,
            reverse=method.reverse_kl,
            temperature=method.temperature,
        )
        return {"distillation": Term(value)}


def _counted(batch: Mapping[str, Any], logits: Tensor, *, aligned: bool) -> Tensor:
    """Bool ``[B, S]``: whether the logits at a place predict a token that the task's loss is over.

    ``aligned``: labels stand where they are predicted, and not one place later.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if (shifted := batch.get("shift_labels")) is not None:
        return counted & (shifted.to(logits.device) != -100)
    if labels is not None:
        counted &= labels.to(logits.device) != -100
    if aligned:
        return counted
    if mask is not None and mask.dim() == 2:
        counted &= mask.to(logits.device).bool()
    following = torch.zeros_like(counted)
    following[:, :-1] = counted[:, 1:]
    if mask is not None and mask.dim() == 2:
        following &= mask.to(logits.device).bool()
    return following
