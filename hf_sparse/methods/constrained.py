"""What methods share that hold parameters within bounds by changing them after each update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_sparse.adapters import Block
from hf_sparse.composite import parts_of
from hf_sparse.errors import PatchError
from hf_sparse.norms import Norm, preceding_norms
from hf_sparse.patching import transformers_model

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


def patched_blocks(model: nn.Module) -> list[Block]:
    """The patched blocks of ``model``.

    Raises:
        PatchError: there is none.

    """
    blocks = [b for part in parts_of(transformers_model(model)) for b in part.all_blocks if b.is_patched]
    if not blocks:
        raise PatchError(f"no MLP block of this {type(model).__name__} is patched; patch the model first.")
    return blocks


def require_patched(sparsity: SparsityConfig | None, method: str) -> None:
    """Refuse a dense baseline, for a ``method`` that changes the norms before patched blocks.

    Raises:
        ValueError: it is one.

    """
    if sparsity is None:
        raise ValueError(
            f"methods.{method} is for the norms before patched blocks, and patch=none patches none; "
            "leave it out."
        )


def restricted_norms(model: nn.Module, method: str) -> list[Norm]:
    """The norms before the patched blocks, each once, whose weights ``method`` is to bound.

    Raises:
        PatchError: a block has none before it, or one without weights.
        ValueError: they are not trained, or cannot be changed.

    """
    norms: dict[int, Norm] = {}
    for place, norm in preceding_norms(transformers_model(model), patched_blocks(model)).items():
        if norm is None or norm.weight is None:
            what = "no norm stands before it" if norm is None else f"{norm.name} has no weight"
            raise PatchError(
                f"methods.{method} bounds the weight of the norm before each patched MLP block, but at "
                f"{place} {what}; leave the method out, or such blocks unpatched (layers=)."
            )
        norms[id(norm.module)] = norm
        require_trained(norm.weight, norm.name, method)
    return list(norms.values())


def require_trained(parameter: nn.Parameter, name: str, method: str) -> None:
    """Refuse a parameter that is not trained: what is changed of it could be lost with an adapter.

    Raises:
        ValueError: names it.

    """
    if not parameter.requires_grad:
        raise ValueError(
            f"methods.{method} changes {name}, which is not trained (requires_grad=False). With LoRA, train "
            "norms and biases as well, or name them in modules_to_save."
        )
    require_changeable(parameter, method)


def require_changeable(parameter: nn.Parameter, method: str) -> None:
    """Refuse a parameter of which an optimizer keeps its own copy, that would undo each change.

    Raises:
        ValueError: DeepSpeed does.

    """
    own: Any = parameter
    if hasattr(own, "ds_id") or hasattr(own, "_hp_mapping"):
        raise ValueError(
            f"methods.{method} changes parameters after each update, but DeepSpeed keeps copies of them; "
            "train with FSDP2 or data parallelism."
        )


class FrozenBiases:
    """The biases of norms, not trained until :meth:`release`."""

    def __init__(self, norms: Sequence[Norm]) -> None:
        self._norms = [norm for norm in norms if norm.bias is not None and norm.bias.requires_grad]
        self._set(False)

    def release(self) -> None:
        """Train them again."""
        self._set(True)

    def _set(self, trained: bool) -> None:
        for norm in self._norms:
            if norm.bias is not None:
                norm.bias.requires_grad_(trained)
