"""What hf_sparse patches of each model type, and the row of docs/coverage.md that says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.adapters import Block, find_blocks
from support.every_type import ModelType
from support.inventory import FFN, ffns


@dataclass(frozen=True)
class Coverage:
    """One model type: its FFNs, and those that ``hf_sparse.patch(model, "relu")`` patches."""

    kind: ModelType
    every: Sequence[FFN]
    patched: Sequence[FFN]
    reasons: Sequence[str]
    """Why others are not, a line each."""
    refused: bool
    """Whether patch refuses the model."""

    @property
    def whole(self) -> bool:
        return len(self.patched) == len(self.every)

    def row(self) -> str:
        """A line of the table of its family."""
        shapes = ", ".join(dict.fromkeys(ffn.shape for ffn in self.every)) or "no FFN"
        share = f"{len(self.patched)} of {len(self.every)}" if self.every else "—"
        return f"| {self.kind.name} | {share} | {shapes} | {'; '.join(self.reasons)} |"


def coverage(kind: ModelType, model: PreTrainedModel) -> Coverage:
    """Of ``model``, a stock one of that ``kind``, which is stock again afterwards."""
    every = ffns(model)
    blocks, skipped = find_blocks(model)
    found = [ffn for ffn in every if is_covered(ffn, blocks)]
    why = {one.name: one.reason for one in skipped}
    refused = False
    reasons = Counter(_why_not(ffn, why.get(ffn.name)) for ffn in every if ffn not in found)
    try:
        hf_sparse.patch(model, "relu")
        hf_sparse.unpatch(model)
    except PatchError as error:
        refused = True
        if found:
            reasons[_refusal(error, found)] = len(found)
    patched = [] if refused else found
    return Coverage(kind, every, patched, [f"{n} x {reason}" for reason, n in reasons.items()], refused)


def is_covered(ffn: FFN, blocks: Iterable[Block]) -> bool:
    """Whether ``blocks`` have all of ``ffn``: of every expert, if they are single modules."""
    downs = {f"{block.name}.{block.roles.down}{end}" for block in blocks for end in ("", ".weight")}
    return all(weights & downs for weights in ffn.weights)


def _why_not(ffn: FFN, reason: str | None) -> str:
    why = ffn.place or ("another formula" if reason else "not recognised")
    return f"{ffn.class_name}: {why}"


def _refusal(error: PatchError, found: Sequence[FFN]) -> str:
    names = "/".join(dict.fromkeys(ffn.class_name for ffn in found))
    if "no field of" in str(error):
        return f"{names}: no field of the top config sets its activation"
    return f"{names}: refused, {str(error).split(';')[0].split('. ')[0]}"
