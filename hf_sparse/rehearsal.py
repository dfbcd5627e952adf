"""A forward without weights: what happens around the MLP blocks of a model, found out by running its class.

A stock model of the same config is built on the meta device, and run once with fake tensors on two short
sequences of tokens. Names and structures of layers are not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.adapters.experts import Experts
from hf_sparse.composite import parts_of
from hf_sparse.errors import PatchError
from hf_sparse.stock import build_stock

SEQUENCES = 2
LENGTHS = {"input_ids": 3, "decoder_input_ids": 5}
"""Tokens in a sequence: no two sizes are alike, so that none is taken for another."""


class Rehearsal:
    """A weightless stock model like ``model``, to be hooked and then run.

    Raises:
        PatchError: it cannot be built.

    """

    def __init__(self, model: PreTrainedModel) -> None:
        built = build_stock(model, None, None)
        if built is None:
            raise PatchError(f"no stock {type(model).__name__} can be built from its config to look at it.")
        self.model = built.eval()
        self._blocks = {block.place: block for part in parts_of(built) for block in part.all_blocks}
        self._failure: Exception | None = None
        for block in self._blocks.values():
            if isinstance(block.roles, Experts):
                # Which tokens go where is a question of values.
                vars(block.module)["forward"] = lambda x, *_, **__: torch.zeros_like(x)

    def block(self, place: str) -> Block:
        """The block at ``place``, as :attr:`Block.place` gives it.

        Raises:
            PatchError: the config builds none there.

        """
        if place not in self._blocks:
            raise PatchError(
                f"the config of this {type(self.model).__name__} builds no MLP block at {place}."
            )
        return self._blocks[place]

    def run(self) -> None:
        """One forward, as far as it comes."""
        lengths = {
            k: n for k, n in LENGTHS.items() if k == "input_ids" or self.model.config.is_encoder_decoder
        }
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            inputs: dict[str, Tensor] = {
                name: torch.zeros(SEQUENCES, length, dtype=torch.int64, device="meta")
                for name, length in lengths.items()
            }
            try:
                self.model(**inputs)
            except Exception as error:  # of any class of model, for any reason
                self._failure = error

    def require(self, seen: Collection[str], places: Iterable[str], what: str) -> None:
        """Refuse a model in whose forward ``what`` was not ``seen`` to be right at all of ``places``.

        Raises:
            PatchError: names the first place that is missing, and why.

        """
        if missing := [place for place in places if place not in seen]:
            forward = f"a forward of {SEQUENCES} x {LENGTHS['input_ids']} tokens"
            why = "did not come there" if self._failure is None else f"failed: {self._failure}"
            raise PatchError(
                f"{what} cannot be had at {missing[0]} of {type(self.model).__name__}: {forward} {why}. "
                "Leave it out, or these blocks (exclude=)."
            )
