"""A linear layer that can skip zeros of its input, and make some."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import triton_ops
from hf_sparse.adapters.int8 import fits, int8_of, int8_runs, stored
from hf_sparse.adapters.pruning import Pruning, column_norms, wide
from hf_sparse.errors import PatchError
from hf_sparse.modules.decoding_linear import of_another_class, product
from hf_sparse.modules.derived import Derived
from hf_sparse.modules.guarded import GuardedModule
from hf_sparse.modules.hooked import carry_hooks
from hf_sparse.modules.ownership import (
    any_lent,
    give_back,
    held_weakly,
    holds_alone,
    is_lent,
    lend,
    neuron_major,
)
from hf_sparse.modules.sparse_block import hooks_on_all_modules
from hf_sparse.modules.surroundings import has_own_forward, is_plain, overridden, transformed
from triton_ops import DENSE, Int8Weight, Problem
from triton_ops.layout import view_of

# What belongs to one module object and is not taken over from the stock layer.
_NOT_SHARED = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")


class _Vectors(NamedTuple):
    """What a pruning has to know of a weight ``[D, F]``: float32, of a float64 weight float64."""

    norms: Tensor
    """Of its columns, ``[F]``."""
    sums: Tensor
    """Of its rows, ``[D]``."""

    @classmethod
    def of(cls, weight: Tensor) -> _Vectors:
        return cls(column_norms(weight), weight.detach().sum(1, dtype=wide(weight.dtype)))


_FAR = 2.0
"""Times the norm of s(x): a larger ``s(x) - c`` is of a center far from the values, and rounds x away."""


def _shifted(x: Tensor, weight: Tensor, shift: Tensor, backend: str) -> Tensor:
    """``x weightᵀ + shift``, with a ``shift [D]`` in float32 or more that may be much larger than the result.

    The operator takes a bias in the dtype of the weight; what that cannot hold is added afterwards.
    """
    if x.dtype == shift.dtype:
        return triton_ops.sparse_linear(x, weight, shift, backend=backend)
    most = torch.finfo(x.dtype).max
    bias = shift.clamp(-most, most).to(x.dtype)
    y = triton_ops.sparse_linear(x, weight, bias, backend=backend)
    return (y + (shift - bias)).to(x.dtype)


class SparseLinear(GuardedModule, nn.Linear):
    """In the place of a stock ``nn.Linear``, whose parameters and hooks it shares.

    It is right for any input: what is zero adds nothing, whatever made it so.

    Args:
        stock: the layer to stand in for; it is not changed.
        gives_zeros: whether its input has exact zeros.
        pruning: what it leaves out of its input; None if nothing.

    """

    pruning: Pruning | None

    density: float | None
    """As :attr:`hf_sparse.modules.SparseBlock.density`."""

    def __init__(self, stock: nn.Linear, *, gives_zeros: bool, pruning: Pruning | None = None) -> None:
        nn.Module.__init__(self)
        # The very dicts of parameters and hooks: what is put into one layer is in the other.
        self.__dict__.update({k: v for k, v in vars(stock).items() if k not in _NOT_SHARED})
        self._stock = (stock,)  # in a tuple, so that it is not registered as a child
        self.gives_zeros = gives_zeros
        self.pruning = pruning
        self.density = None
        self._vectors = Derived(_Vectors.of)
        carry_hooks(stock, self)

    def restore(self) -> nn.Linear:
        """The stock layer, with what this one has now.

        Raises:
            PatchError: a tool computes its parameters now (``torch.nn.utils.parametrize``).

        """
        if type(self) is not SparseLinear:
            raise of_another_class(self)
        self.disclose()
        (stock,) = self._stock
        own = (*_NOT_SHARED, "_stock", "gives_zeros", "pruning", "density", "_vectors")
        for gone in vars(stock).keys() - vars(self).keys() - {*_NOT_SHARED}:
            del vars(stock)[gone]  # such as what a pruning that has ended had put there
        vars(stock).update({k: v for k, v in vars(self).items() if k not in own})
        carry_hooks(self, stock)
        return stock

    def disclose(self) -> None:
        """Give the weight its stock layout back, and forget what was made of it."""
        self._vectors.drop()
        weight = self._parameters.get("weight")
        if weight is not None:
            give_back(stored(weight))

    def withholds(self) -> bool:
        """As of any module that is guarded."""
        return any_lent() or self._needs_vectors

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a copy has a weight of its own."""
        return {**super().__getstate__(), "_vectors": Derived(_Vectors.of)}

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., F]`` to ``[..., D]``, any floating dtype."""
        backend, weight, vectors = self._way(input)
        bias: Tensor | None = None if weight is None else self._parameters["bias"]
        pruning = self.pruning
        if pruning is not None:
            norms = None
            if pruning.weighted:
                norms = column_norms(self._whole_weight()) if vectors is None else vectors.norms
            input = pruning.values(input, norms)
            if pruning.center and weight is not None and backend != DENSE and vectors is not None:
                center, wider = pruning.center_in(input.dtype), vectors.sums.dtype
                far = input - center
                if not (far.to(wider).norm() > _FAR * input.to(wider).norm()):
                    shift = center * vectors.sums
                    return _shifted(far, weight, shift if bias is None else shift + bias, backend)
                backend = DENSE
        if weight is None:
            y = self._int8(input)
            return nn.Linear.forward(self._unguarded(), input) if y is None else y
        if backend == DENSE:
            return product(input, weight, bias)
        return triton_ops.sparse_linear(input, weight, bias, backend=backend)

    def _way(self, h: Tensor) -> tuple[str, Tensor | None, _Vectors | None]:
        """Backend, weight and what was made of it; no weight where the forward of ``nn.Linear`` has to run.

        A view of the weight: another thread may change its layout meanwhile.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and (transformed() or overridden()):
            return DENSE, None, None
        if self.training or torch.is_grad_enabled():
            if not compiling:
                self.disclose()  # the weight belongs to whoever trains it
            return DENSE, None, None
        # Asked before a variable here holds the weight.
        vectors = None if compiling else self._vectors_now()
        lendable = compiling or self.may_lend()
        weight = self._readable()
        if weight is None or weight.dtype != h.dtype or weight.device != h.device:
            return DENSE, None, None
        plan = triton_ops.plan(weight, "linear")
        if self.gives_zeros and lendable:
            backend = plan.backend(h.numel() // self.in_features, self.density)
            if backend != DENSE and (rows := neuron_major(weight)) is not None:
                return backend, rows, vectors
        if plan.product != DENSE and triton_ops.is_neuron_major(weight):
            return plan.product, weight if compiling else view_of(weight), vectors
        if plan.stalls and not compiling:
            give_back(weight)
        return DENSE, None if compiling else view_of(weight), vectors

    def _int8(self, h: Tensor) -> Tensor | None:
        """The product with a weight that is int8; None where it is another, or must be called."""
        bias, compiling = self._parameters.get("bias"), torch.compiler.is_compiling()
        if self.training or (not compiling and overridden()) or not self._is_undisturbed():
            return None
        if not int8_runs(h, bias):
            return None
        # Before a variable here holds the rows.
        lendable = self.gives_zeros and (compiling or self.may_lend())
        held = int8_of(self._parameters["weight"])
        if held is None or not fits(held, bias, h):
            return None
        rows = neuron_major(held.rows) if lendable else None
        if rows is not None and triton_ops.is_neuron_major(rows):
            return triton_ops.int8_sparse_linear(h, Int8Weight(rows, held.scale), bias)
        return triton_ops.int8_linear(h, held, bias)

    def _vectors_now(self) -> _Vectors | None:
        """What the pruning has to know of the weight; None where that cannot be kept, or is not needed.

        Asked while no variable holds the weight. Whoever does, if weakly, may change it.
        """
        if not self._needs_vectors or self._readable() is None:
            return None
        since = self._vectors.mark
        if not self._is_alone():
            self._vectors.drop()
            return None
        held = self._vectors.of(cast(Tensor, self._parameters["weight"]), since)
        if not self._is_alone():  # another thread has taken it meanwhile
            self._vectors.drop()
            return None
        return None if held is None else held[0]

    @property
    def _needs_vectors(self) -> bool:
        pruning = self.pruning
        return pruning is not None and (pruning.weighted or pruning.center != 0)

    def _is_alone(self) -> bool:
        """Whether nobody else holds the weight or its memory, not by a weak reference either."""
        return not self._held_weakly() and holds_alone(self, self._stock, "weight")

    def _held_weakly(self) -> bool:
        weight: Any = self._parameters["weight"]
        own = is_lent(weight) + self._vectors.references(weight)
        return held_weakly(weight, own) or held_weakly(self._stock[0])

    def _whole_weight(self) -> Tensor:
        """The weight ``[D, F]``, for the norms of its columns.

        Raises:
            PatchError: there is only a part of it, or a quantised one.

        """
        weight = self._unguarded().weight
        known = (Tensor, nn.Parameter)
        plain = type(weight) in known or torch.compiler.is_compiling() or transformed()
        if not plain or tuple(weight.shape) != (self.out_features, self.in_features):
            raise PatchError(
                f"a linear layer {self.in_features} -> {self.out_features} has a threshold that is weighted "
                f"by the norms of its columns, and its weight is a {type(weight).__name__} of shape "
                f"{tuple(weight.shape)} (quantised, or split over processes); use thresholds without weights."
            )
        return weight

    def problems(self) -> tuple[list[Problem], str | None]:
        """What the layer can run of the operators as it is, or why it can run none."""
        weight = self._readable()
        if self.obstacle is not None or weight is None:
            return [], self.obstacle
        device = weight.device.type
        return [Problem("linear", self.out_features, self.in_features, weight.dtype, device, False)], None

    def prepare(self) -> None:
        """Store the weight neuron-major; else the first call that skips does so."""
        if self.gives_zeros and self.may_lend() and (self._readable() is not None or self.skips_int8):
            lend(stored(cast(Tensor, self._parameters["weight"])))

    @property
    def is_held(self) -> bool:
        """Whether only a holder of the weight, or of its memory, keeps the layer from skipping."""
        return (self._readable() is not None or self.skips_int8) and not self.may_lend()

    @property
    def skips_int8(self) -> bool:
        """As :attr:`hf_sparse.modules.SparseBlock.skips_int8`."""
        held = int8_of(self._parameters.get("weight"))
        return self.gives_zeros and held is not None and self._is_undisturbed()

    @property
    def obstacle(self) -> str | None:
        """Why the layer cannot skip as it is, if it cannot."""
        if not self.gives_zeros:
            return "its activation is not exactly zero"
        if self._readable() is None:
            return "its linear layer must be called (a hook, quantised or offloaded weights)"
        return None

    def may_lend(self) -> bool:
        """Whether the weight may be stored neuron by neuron, or is; asked while no variable holds it."""
        weight = self._parameters.get("weight")
        if weight is None or is_lent(stored(weight)):
            return weight is not None
        del weight
        return holds_alone(self, self._stock, "weight")

    def _readable(self) -> Tensor | None:
        """The weight, if it may be read directly: as :meth:`SparseMLP.readable`."""
        weight = self._parameters.get("weight")
        return weight if is_plain(weight) and self._is_undisturbed() else None

    def _is_undisturbed(self) -> bool:
        """Whether a call of the layer does no more than multiply with its weight."""
        if self._forward_hooks or self._forward_pre_hooks or hooks_on_all_modules():
            return False
        if type(self) is not SparseLinear:  # parametrised, or sharded by itself
            return False
        if "forward" in vars(self) or "bias" not in self._parameters:
            return False
        return has_own_forward(self._stock[0])

    def _unguarded(self) -> nn.Linear:
        """This layer as the stock class: the same attributes, nothing disclosed by their use."""
        if torch.compiler.is_compiling() or type(self) is not SparseLinear:
            return self
        view = object.__new__(nn.Linear)
        object.__setattr__(view, "__dict__", self.__dict__)
        return view
