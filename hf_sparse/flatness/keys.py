"""Augmented flatness of the key matrix, and the denominator that makes a density of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters import Block
from hf_sparse.adapters.roles import Site
from hf_sparse.errors import PatchError
from hf_sparse.flatness.pruned_matrix import PrunedMatrix
from hf_sparse.flatness.slope import slope
from hf_sparse.flatness.sums import Sums, pieces, squared
from hf_sparse.observing import CallObserver


@dataclass(frozen=True, kw_only=True)
class KeySums(Sums):
    """Of one block, over T tokens and their n neurons each.

    L is the summed loss of the sequence in nats, ``g = ∂L/∂a``, ``σ' = σ'(p)``, and x the input that the key
    matrix is multiplied with: where that has a threshold, what it leaves of the block's input. *Active* is
    what has ``σ' ≠ 0``.
    """

    tokens: int = 0
    """T."""
    active: int = 0
    """Pairs of a token and an active neuron."""
    flatness: float = 0.0
    """``AF_K = Σ_t |∂L/∂p_t|² |x_t|²``: the squared norms of the gradients that a key matrix of each token's
    own would have (arXiv 2605.25612). The smaller, the flatter."""
    product: float = 0.0
    """``Σ g² σ'² |x|²`` over active pairs: C, the denominator, is the mean of it."""
    inputs: float = 0.0
    """``Σ_t |x_t|²``."""
    gradients: float = 0.0
    """``Σ g²`` over active pairs."""
    slopes: float = 0.0
    """``Σ σ'²`` over active pairs."""
    down_gradients: float = 0.0
    """``Σ (∂L/∂h)²`` over active pairs, h being the input of the down projection: a gated block multiplies
    this gradient by what its up projection gives."""
    positive: int = 0
    """Pairs with ``p > 0``, those that ReLU would have active."""
    positive_flatness: float = 0.0
    """The part of ``flatness`` that these have."""
    jsrelu_product: float = 0.0
    """``Σ g² (1 + p)² |x|²`` over pairs with ``p > 0``: ``product`` with the slope of J-SquaredReLU."""
    uplifted_product: float = 0.0
    """``product`` with the gain of the norm before the block lifted to 1; NaN if there is no such norm."""


class Gain(NamedTuple):
    """How the norm before a block scales, ``[D]`` each: ``x = gain * normalised + bias``."""

    gain: Tensor
    bias: Tensor | None

    def uplifted(self, x: Tensor) -> Tensor:
        """What ``x [T, D]`` would be if no gain were smaller than 1 in magnitude; NaN where one is 0."""
        gain = self.gain.to(x.device, torch.float32)
        lift = gain.abs().clamp(min=1) / gain.abs()
        if self.bias is None:
            return x.float() * lift
        bias = self.bias.to(x.device, torch.float32)
        return (x.float() - bias) * lift + bias


class KeyFlatness(CallObserver):
    """Sums up :class:`KeySums` of one block.

    The key matrix K is the first projection of a plain block, and the gate projection of a gated one: the one
    that gives ``p``. The theory is of plain blocks. In a gated one the identity holds just as well, since
    ``∂L/∂p = g σ'(p)`` there, too; but ``g = u ⊙ ∂L/∂h`` then has the up projection's output as a factor,
    which nothing bounds. It does not hold of activations that are not elementwise.

    Raises:
        PatchError: experts; something stands between the projection and the activation, so that the gradient
            in ``p`` is not that of K's output; K has a threshold on its input and an adapter.
        ValueError: from ``with``: ``p`` of a stock block cannot be watched (patching it with ``"original"``
            mends that).

    """

    values_at: ClassVar[tuple[Site, ...]] = ("x", "p")
    gradients_at: ClassVar[tuple[Site, ...]] = ("p", "a", "h")

    def __init__(self, block: Block, gain: Gain | None = None) -> None:
        super().__init__(block)
        self._gain = gain
        self._sums = KeySums()
        self._key = block.roles.names[0]
        self._pruned = PrunedMatrix.of(block, self._key)
        self._made: tuple[int, int] | None = None

    def result(self) -> KeySums:
        self.require_gradients()
        return self._sums

    def _watch(self) -> Iterator[RemovableHandle]:
        yield from super()._watch()
        yield self.block.module.get_submodule(self._key).register_forward_hook(self._keep_made)

    def _keep_made(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._made = _memory(output)

    def _pass(self, site: Site, values: Tensor, tokens: Tensor | None) -> None:
        if site == "p":
            self._require_output_of_key(values)
        super()._pass(site, values, tokens)

    def _require_output_of_key(self, p: Tensor) -> None:
        name, neurons = self.block.name, self.block.intermediate_size
        if self._made != _memory(p):
            raise PatchError(
                f"{name} ({self.block.stock_class.__name__}) changes what {self._key} gives before it "
                "reaches the activation (a clamp or a selection does so), so that the gradient there is not "
                "that of the key matrix."
            )
        if p.shape[-1] != neurons:
            raise PatchError(
                f"{name} has {neurons} neurons and gives its activation {p.shape[-1]}: it is split between "
                "processes. Load the model without tensor parallelism."
            )

    def update_call(self, values: Mapping[Site, Tensor], gradients: Mapping[Site, Tensor]) -> None:
        for x, p, p_grad, a_grad, h_grad in pieces(
            values["x"], values["p"], gradients["p"], gradients["a"], gradients["h"]
        ):
            self._sums += self._of(x, p, p_grad, a_grad, h_grad)

    def _of(self, x: Tensor, p: Tensor, p_grad: Tensor, a_grad: Tensor, h_grad: Tensor) -> KeySums:
        sigma = slope(self.block.activation, p).float()
        active, positive = sigma != 0, p > 0
        gradient, slopes, effective = squared(a_grad), sigma.square(), squared(p_grad)
        jumping = gradient * (1 + p.float()).square()
        uplifted = None if self._gain is None else self._pruned.left(self._gain.uplifted(x))
        x = self._pruned.left(x)
        columns = [  # [T] each
            squared(x).sum(-1),
            effective.sum(-1),
            (gradient * slopes).sum(-1),
            active.sum(-1),
            (gradient * active).sum(-1),
            slopes.sum(-1),
            (squared(h_grad) * active).sum(-1),
            positive.sum(-1),
            (effective * positive).sum(-1),
            (jumping * positive).sum(-1),
            torch.full_like(x[:, 0], torch.nan) if uplifted is None else squared(uplifted).sum(-1),
        ]
        # On the CPU: not every device has float64. A count below 2 ** 24 is exact in float32.
        table = torch.stack([one.float() for one in columns]).cpu().double()
        x2, eta2, gs2, n, g2, s2, d2, n_positive, eta2_positive, jump2, uplifted2 = table
        return KeySums(
            tokens=len(x),
            active=int(n.sum()),
            flatness=float(eta2 @ x2),
            product=float(gs2 @ x2),
            inputs=float(x2.sum()),
            gradients=float(g2.sum()),
            slopes=float(s2.sum()),
            down_gradients=float(d2.sum()),
            positive=int(n_positive.sum()),
            positive_flatness=float(eta2_positive @ x2),
            jsrelu_product=float(jump2 @ x2),
            uplifted_product=float(gs2 @ uplifted2),
        )


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Which memory a tensor or a view of it has, and what was written there."""
    return tensor.untyped_storage()._cdata, tensor._version
