"""Each MLP block learns the output of the dense block that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from hf_sparse.adapters import Block, require_blocks
from hf_sparse.errors import PatchError
from hf_sparse.methods.method import Acting, Method, Term, Training
from hf_sparse.methods.teacher import Precision, load_teacher
from hf_sparse.objectives import BlockMatching

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class Blockwise(Method):
    """Per-layer matching of MLP outputs, ours: the mean over tokens and blocks of ``|y - t|^2 / |t|^2``.

    ``y`` and ``t`` are the outputs of a patched block and of the dense one on the same input. Only parameters
    of patched blocks are trained, each block by its own error: no loss of the task, no backward through
    attention or the LM head, no optimizer state but of MLPs. The dense blocks are held in every process.
    """

    name = "blockwise"
    # It trains nothing but MLPs, and no gradient comes from the logits.
    excludes = ("distillation", "norm_clamp", "norm_rescale", "norm_uplift")
    has_teacher = True

    input: Literal["student", "teacher"] = "student"
    """Whose outputs the layers after a block get while training: with those of the teacher, every block sees
    what it sees in the dense model; with those of the student, what it will see in use."""

    teacher_dtype: Precision = "float32"
    """Of the dense blocks' parameters; bfloat16 takes half the memory."""

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.blockwise has no meaning with patch=none: there is no block to be matched. Leave it "
                "out, or choose an activation."
            )
        if "zeroth_bias" in sparsity.parts:
            raise ValueError(
                "methods.blockwise cannot train zeroth biases, which act from layer to layer; leave "
                "zeroth_bias out of the patch, or use methods.distillation."
            )

    def attach(self, training: Training) -> Acting:
        model = training.model
        own = [block for block in require_blocks(model)[0] if block.is_patched]
        if stays := [block.name for block in own if block.stays]:
            raise PatchError(
                f"methods.blockwise needs MLPs that are modules of their own, and {stays[0]} is not: its "
                "layer computes it in its own forward. Use methods.distillation instead."
            )
        inside = {id(p) for block in own for p in block.module.parameters() if p.requires_grad}
        if not inside:
            raise PatchError(
                "methods.blockwise trains the parameters of patched MLP blocks, and none there wants a "
                "gradient. Patch the model first; adapters (LoRA) have to be on the MLPs."
            )
        dense = load_teacher(training, self.name, self.teacher_dtype)
        matching = BlockMatching(model, _pairs(model, dense), self.input)
        frozen = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        return _Acting(model, matching, frozen)


class _Acting(Acting):
    def __init__(self, model: nn.Module, matching: BlockMatching, frozen: list[str]) -> None:
        self._model, self._matching, self._frozen = model, matching, frozen

    def before_step(self, step: int) -> None:
        # Not asked in attach, which comes before the model is sharded.
        if _is_sharded(self._model):
            raise ValueError(
                "methods.blockwise cannot train a sharded model (FSDP, ZeRO-3, tensor parallelism): weights "
                "are gathered there for a backward from layer to layer, and this has none. Use data "
                "parallelism; gradients and optimizer are of the MLPs only."
            )

    def task_weight(self, step: int) -> float:
        return 0.0

    def loss(self, step: int, batch: Mapping[str, Any], output: Any) -> dict[str, Term]:
        masks = (batch.get(name) for name in ("attention_mask", "decoder_attention_mask"))
        two = (mask if mask is not None and mask.dim() == 2 else None for mask in masks)
        return {"blockwise": Term(self._matching.value(*two))}

    def detach(self) -> None:
        self._matching.remove()
        parameters = dict(self._model.named_parameters())
        for name in self._frozen:
            if name in parameters:  # sharding may have exchanged it
                parameters[name].requires_grad_(True)


def _is_sharded(model: nn.Module) -> bool:
    if any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in model.parameters()):
        return True
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())


def _pairs(model: nn.Module, dense: nn.Module) -> dict[nn.Module, nn.Module]:
    """The dense module for each patched block.

    Raises:
        ValueError: the models have different blocks.

    """

    def sizes(blocks: list[Block]) -> list[tuple[int, int]]:
        return [(block.hidden_size, block.intermediate_size) for block in blocks]

    own, others = require_blocks(model)[0], require_blocks(dense)[0]
    if sizes(own) != sizes(others):
        raise ValueError(
            f"methods.blockwise: the model has {len(own)} MLP blocks and the dense one {len(others)}, or "
            "they differ in size; `dense` must give the model that the training began from."
        )
    return {a.module: b.module for a, b in zip(own, others, strict=True) if a.is_patched}
