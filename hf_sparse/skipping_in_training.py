"""Training without the silent neurons."""

from __future__ import annotations

from torch import nn

from hf_sparse.errors import PatchError
from hf_sparse.modules import SparseMLP, sparse_parts
from hf_sparse.patching import transformers_model
from triton_ops.pairs import require_share


def skip_in_training(model: nn.Module, max_density: float = 0.1) -> int:
    """Let patched MLP blocks compute only what is active while they are trained, backward included.

    A block computes its deciding projection, counts the pairs of a token and an active neuron, and goes on
    with these alone if they are few (:func:`triton_ops.trained_mlp`, by the compiled CPU kernels). Losses and
    gradients are the same to rounding, activations that are kept for the backward pass become few as well.
    Above ``max_density``, on other devices, and wherever a module must be called, it runs dense: with a hook
    in the block, LoRA, dropout, quantised weights, weights that are split between processes while it runs
    (not under FSDP2, which gathers them before), under ``torch.compile``. What looks into every forward has
    hooks: an L1 penalty, ProSparse and a controlled sparsity do.

    It is a state of the modules, not of the config, and no part of a checkpoint. With gradient checkpointing
    it must not change between a forward and its backward pass, nor may hooks: torch then finds other tensors
    than it kept, and raises an error.

    Args:
        model: a patched model, before it is wrapped for data parallelism; under PEFT as well.
        max_density: share of active pairs, 0 to 1, up to which a block skips. Where that pays depends on how
            fast the machine multiplies: ``benchmarks/trained_mlp.py`` measures it. 0 ends it.

    Returns:
        How many blocks can skip as they are now, on this machine.

    Raises:
        PatchError: the model is not patched.
        ValueError: ``max_density`` is not a share.

    """
    require_share("max_density", max_density)
    base = transformers_model(model)
    parts = sparse_parts(base)
    if not parts:
        raise PatchError(f"skip_in_training needs a patched model; {type(base).__name__} is not patched.")
    return sum(part.skip_in_training(max_density) for part in parts if isinstance(part, SparseMLP))
