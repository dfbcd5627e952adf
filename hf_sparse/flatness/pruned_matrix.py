"""A matrix that leaves out a part of its input: thresholds on the inputs of linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.adapters import Block
from hf_sparse.adapters.pruning import Pruning
from hf_sparse.adapters.roles import input_pruning, readable_norms
from hf_sparse.errors import PatchError
from hf_sparse.modules import SparseLinear


@dataclass(frozen=True)
class PrunedMatrix:
    """What the matrix of a linear layer is multiplied with, of what the layer is given."""

    pruning: Pruning | None
    """None if it is the whole."""
    norms: Tensor | None
    """Those of the matrix's columns, if the pruning needs them."""

    @classmethod
    def of(cls, block: Block, name: str) -> PrunedMatrix:
        """That of the child ``name`` of ``block``.

        Raises:
            PatchError: an adapter beside the matrix is given the whole; or the norms cannot be read.

        """
        linear = block.module.get_submodule(name)
        pruning = input_pruning(linear)
        if pruning is not None and type(linear) is not SparseLinear:
            raise PatchError(
                f"{name} of {block.name} has a threshold on its input and an adapter, which is given all of "
                "it: these are two matrices with two inputs. Merge the adapter, or explain the model without "
                "the threshold."
            )
        weighted = pruning is not None and pruning.weighted
        return cls(pruning, readable_norms(linear) if weighted else None)

    def center_in(self, dtype: torch.dtype) -> float:
        """What is taken for the rest of an input of this dtype."""
        return 0.0 if self.pruning is None else self.pruning.center_in(dtype)

    def left(self, x: Tensor) -> Tensor:
        """What it multiplies of ``x [..., in]``."""
        return x if self.pruning is None else self.pruning.values(x, self.norms)
