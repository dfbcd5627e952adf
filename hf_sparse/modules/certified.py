"""The certificate of a block's deciding projection, and when a token is decoded with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

import triton_ops
from hf_sparse.modules.derived import Derived
from hf_sparse.modules.ownership import held_weakly
from triton_ops import DENSE, Certificate, certify

if TYPE_CHECKING:
    from hf_sparse.modules.sparse_mlp import SparseMLP


class Certified(Derived[Certificate]):
    """Whether a block decodes with a certificate, and that of its weight ``[F, D]``, if it has one now.

    The operators check the stamp again, in a compiled graph too.
    """

    def __init__(self) -> None:
        super().__init__(certify)
        self.wanted = False

    def may_serve(self, block: SparseMLP, stock: tuple[nn.Module], tokens: int) -> bool:
        """Whether it may be used for so many tokens; to be asked before fetching the weights."""
        if not self.wanted or torch.compiler.is_compiling():
            return self.wanted and tokens == 1
        if self._held_weakly(block, stock) or not block.owns(block.roles.deciding):
            self.drop()  # whoever holds it now may have changed it when this is asked again
            return False
        return tokens == 1

    def _held_weakly(self, block: SparseMLP, stock: tuple[nn.Module]) -> bool:
        """Whether a weak reference leads to the deciding layer, to its weight or to the stock block."""
        linear = block.deciding()
        if linear is None:
            return False
        weight = cast(Tensor, linear._parameters["weight"])
        return held_weakly(weight, self.references(weight)) or held_weakly(linear) or held_weakly(stock[0])

    def for_one_token(
        self, block: SparseMLP, weight: Tensor, since: object
    ) -> tuple[str, tuple[Certificate, tuple[int, int]] | None]:
        """The backend with a certificate of the deciding projection ``weight``, and that and its stamp.

        It is made if need be; none where it does not pay, or cannot be had. Nobody else held the weight at
        the mark ``since``.
        """
        backend = self.backend(block, weight)
        return backend, None if backend == DENSE else self.of(weight, since)

    def backend(self, block: SparseMLP, weight: Tensor) -> str:
        """The backend for one token with a certificate; dense where that does not pay."""
        return triton_ops.plan(weight, block.roles.form, certified=True).backend(1, block.density)
