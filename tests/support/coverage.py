"""What hf_sparse patches of each model type, and the row of docs/coverage.md that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.adapters import Block, find_blocks
from support.every_type import ModelType
from support.inventory import FFN, ffns


@dataclass(frozen=True)
class Left:
    """FFNs of one class that are not patched."""

    class_name: str
    reason: str
    count: int


@dataclass(frozen=True)
class Coverage:
    """One model type: its FFNs, and those that ``hf_sparse.patch(model, "relu")`` patches."""

    kind: ModelType
    every: Sequence[FFN]
    patched: Sequence[FFN]
    left: Sequence[Left]
    others: Sequence[Block]
    """Blocks that hf_sparse finds and that are no FFNs by their widths."""
    refusal: str
    """What patch says when it refuses the model; else empty."""

    @property
    def whole(self) -> bool:
        return len(self.patched) == len(self.every)

    def row(self) -> str:
        """A line of the table of its family."""
        shapes = ", ".join(dict.fromkeys(ffn.shape for ffn in self.every)) or "no FFN"
        share = f"{len(self.patched)} of {len(self.every)}" if self.every else "—"
        notes = [f"{left.count} {left.class_name}: {left.reason}" for left in self.left]
        if self.others:
            classes = ", ".join(dict.fromkeys(type(block.module).__name__ for block in self.others))
            notes.append(f"takes {len(self.others)} {classes} for FFNs")
        return f"| {self.kind.name} | {share} | {shapes} | {'; '.join(notes)} |"


def coverage(kind: ModelType, model: PreTrainedModel) -> Coverage:
    """Of ``model``, a stock one of that ``kind``, which is stock again afterwards."""
    every = ffns(model)
    blocks, skipped = find_blocks(model)
    found = [ffn for ffn in every if is_covered(ffn, blocks)]
    refusal = ""
    try:
        hf_sparse.patch(model, "relu")
        hf_sparse.unpatch(model)
    except PatchError as error:
        refusal = str(error)
    seen = {one.name for one in skipped}
    left: dict[tuple[str, str], int] = {}
    for ffn in every:
        if ffn in found and not refusal:
            continue
        if ffn in found:
            reason = _why_refused(model)
        else:
            reason = ffn.place or ("another formula" if ffn.name in seen else "not recognised")
        left[ffn.class_name, reason] = left.get((ffn.class_name, reason), 0) + 1
    return Coverage(
        kind=kind,
        every=every,
        patched=[] if refusal else found,
        left=[Left(*key, count) for key, count in left.items()],
        others=[block for block in blocks if not any(ffn.has(down_of(block)) for ffn in every)],
        refusal=refusal,
    )


def down_of(block: Block) -> str:
    """The qualified name of a block's down projection: of a layer, or of a parameter."""
    return f"{block.name}.{block.roles.down}"


def is_covered(ffn: FFN, blocks: Sequence[Block]) -> bool:
    """Whether ``blocks`` have all of ``ffn``: of every expert, if they are single modules."""
    downs = {f"{down_of(block)}{end}" for block in blocks for end in ("", ".weight")}
    return all(weights & downs for weights in ffn.weights)


def _why_refused(model: PreTrainedModel) -> str:
    """Why a model with blocks cannot be patched, of what can be seen in its config."""
    config = model.config
    if type(config).sub_configs:
        return "in another part, patched with `part=`"
    if any(isinstance(value, str) and value in ACT2CLS for value in vars(config).values()):
        return "no single config field sets it"
    return "no config field for the activation"
