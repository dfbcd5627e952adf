"""The dense model as a teacher, for the methods that learn from it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import nn

from hf_sparse.adapters import require_blocks
from hf_sparse.methods.method import Training

Precision: TypeAlias = Literal["float32", "bfloat16"]


def load_teacher(training: Training, method: str, dtype: Precision) -> nn.Module:
    """The dense model of ``training``, in evaluation mode, frozen, with its parameters in ``dtype``.

    Buffers keep their dtype, as those of rotary embeddings must.

    Raises:
        ValueError: the training has no dense model, or one that is patched.

    """
    if training.dense is None:
        raise ValueError(
            f"methods.{method} learns from the dense model: give Training or SparsityCallback a `dense`, "
            "such as lambda: AutoModelForCausalLM.from_pretrained(name)."
        )
    teacher = training.dense()
    if any(block.is_patched for block in require_blocks(teacher)[0]):
        raise ValueError(
            f"methods.{method}: the model to learn from is patched itself, so it is no dense teacher; begin "
            "with the dense model, or give it as `dense`."
        )
    for parameter in teacher.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return teacher.requires_grad_(False).eval()
