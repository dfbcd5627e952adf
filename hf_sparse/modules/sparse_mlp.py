"""MLP blocks whose projections are layers: one operator for the whole block, or for its down projection."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import triton_ops
from hf_sparse.adapters.int8 import stored
from hf_sparse.adapters.probe import computes
from hf_sparse.adapters.roles import LayerRoles, Linear, Roles
from hf_sparse.modules.certified import Certified
from hf_sparse.modules.int8_way import int8_layer, int8_way
from hf_sparse.modules.ownership import any_lent, give_back, holds_layer_alone, is_lent, lend, neuron_major
from hf_sparse.modules.sparse_block import SparseBlock, Way, hooks_on_all_modules
from hf_sparse.modules.stand_in import StandIn
from hf_sparse.modules.surroundings import is_plain, only_multiplies, overridden, transformed
from hf_sparse.modules.trained_way import can_be_trained, trained_way
from triton_ops import DENSE, Problem
from triton_ops.activations import TABLE
from triton_ops.choice import autocasts
from triton_ops.layout import view_of
from triton_ops.problem import Form

_STOCK = Way()


class SparseMLP(SparseBlock):
    """Common part of :class:`SparseGatedMLP` and :class:`SparsePlainMLP`, whose parts are their children."""

    roles: LayerRoles
    trained_density: float
    """Share of active pairs of token and neuron up to which it skips while it is trained; 0: never."""

    def __init__(
        self, stock: nn.Module, roles: Roles, activation: nn.Module, *, relu_up: bool = False
    ) -> None:
        super().__init__(stock, roles, activation, relu_up=relu_up)
        vars(self).update(_certified=Certified(), trained_density=0.0)

    def disclose(self) -> None:
        """Give the down projection its stock layout back, and drop the certificate."""
        self._certified.drop()
        super().disclose()

    def withholds(self) -> bool:
        """As of any module that is guarded."""
        return any_lent() or self._certified.wanted

    def _down_weight(self) -> Tensor | None:
        weight = self._child(self.roles.down)._parameters.get("weight")
        return None if weight is None else stored(weight)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``x [..., D] -> [..., D]``, any floating dtype; by whatever name the stock block calls it."""
        if "forward" in self.__dict__:
            self._forward_ran = True
        if not self.leaves:
            return self._forward(args, kwargs)
        name = None if args else next(iter(kwargs))
        x = self._past_leaves("x", args[0] if name is None else kwargs[name])
        given = ((x, *args[1:]), kwargs) if name is None else ((), {**kwargs, name: x})
        return self._past_leaves("y", self._forward(*given))

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if len(args) == 1 and not kwargs:
            return self._run(args[0], self._way(args[0]))
        if self._computes_itself():
            (x,) = (*args, *kwargs.values())
            return self._run(x, self._way(x))
        if not torch.compiler.is_compiling():
            self.disclose()
        return cast(Tensor, self._stock_function(self._as_stock(), *args, **kwargs))

    def dense(self, x: Tensor) -> Tensor:
        """The block with every neuron, as the stock class computes it, to rounding.

        Without gradient, where torch multiplies slowly with a weight in the layout for decoding, the down
        projection is :func:`triton_ops.sparse_linear`, which is made for that layout.
        """
        x = self._past_leaves("x", x)
        return self._past_leaves("y", self._run(x, self._way(x, skip=False)))

    def _way(self, x: Tensor, *, skip: bool = True) -> Way:
        """How to run this call; all that decides it is asked here, once, and the layout is made to fit.

        The whole block is one operator if the kernels know the activation and all weights may be read, and
        skipping pays. The down projection alone may skip, too: where a projection before it must be called
        (an adapter), where the block selects, and in a plain block where there are too many tokens for the
        whole to pay.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and (transformed() or overridden()):
            return _STOCK
        if self.training or torch.is_grad_enabled():
            if not compiling:
                self.disclose()  # the weights belong to whoever trains them
            trained = skip and torch.is_grad_enabled() and self.trained_density > 0 and not compiling
            return (trained_way(self, x) if trained else None) or _STOCK
        if not self.nothing_else():
            return _STOCK
        tokens = x.numel() // x.shape[-1]
        # Asked before a variable here holds a weight.
        since = None if compiling else self._certified.mark
        certify = skip and self._certified.may_serve(self, self._stock, tokens)
        lendable = compiling or self._may_lend()
        read = self.read(x, self.roles.down)
        if read is None:
            return (int8_way(self, x) if skip and lendable else None) or _STOCK
        ((down, bias),) = read
        zeros = skip and self.gives_zeros
        activation = self.kernel() if zeros and not self.selects else None
        called = None if activation is None else self.read(x, *self.roles.before_down)
        if activation is not None and called is not None:
            first = self.roles.split(called)
            deciding, held, form = first[0][0], None, self.roles.form
            if certify and TABLE[activation[0]].certifiable:
                backend, held = self._certified.for_one_token(self, deciding, since)
            if held is None:
                backend = triton_ops.plan(deciding, form).backend(tokens, self.density)
            if backend != DENSE and lendable and (rows := neuron_major(down)) is not None:
                weights = (*[w for w, _ in first], rows, *[b for _, b in first], bias)
                return Way(form, backend, weights, activation, held)
        plan = triton_ops.plan(down, "linear")
        if zeros and (called is None or self.roles.form == "plain"):
            backend = plan.backend(tokens, self.density)
            if backend != DENSE and lendable and (rows := neuron_major(down)) is not None:
                return Way("linear", backend, (rows, bias))
        if plan.product != DENSE and self._is_linear_down() and triton_ops.is_neuron_major(down):
            # A view: another thread may give the weight back meanwhile.
            return Way("linear", plan.product, (down if compiling else view_of(down), bias))
        if plan.stalls and not compiling:
            give_back(down)
        if not compiling and self._is_linear_down() and triton_ops.is_neuron_major(down):
            return Way(weights=(view_of(down),))  # likewise
        return _STOCK

    def _run(self, x: Tensor, way: Way) -> Tensor:
        weights: Any = way.weights
        if way.form is None:
            return self._stock_forward(x, *weights)
        if way.form == "linear":
            return triton_ops.sparse_linear(self.hidden(x), *weights, backend=way.backend)
        name, threshold = way.activation
        if way.form == "int8":
            return triton_ops.int8_mlp(x, *weights, activation=name, threshold=threshold)
        if way.form == "trained":
            most = self.trained_density
            return triton_ops.trained_mlp(x, *weights, activation=name, threshold=threshold, max_density=most)
        certificate, stamp = way.certificate or (None, None)
        operator: Any = triton_ops.gated_mlp if way.form == "gated" else triton_ops.plain_mlp
        return operator(
            x,
            *weights,
            activation=name,
            threshold=threshold,
            certificate=certificate,
            stamp=stamp,
            backend=way.backend,
        )

    def _stock_forward(self, x: Tensor, down: Tensor | None = None) -> Tensor:
        """The forward of the stock class; with ``down`` for the weight of the down projection."""
        layer: Any = None
        if down is not None:
            own = vars(self._child(self.roles.down))
            layer = object.__new__(type(self._child(self.roles.down)))
            vars(layer).update(own, _parameters={**own["_parameters"], "weight": down})
        if self._computes_itself():
            return cast(Tensor, (layer or self._child(self.roles.down))(self.hidden(x)))
        return cast(Tensor, self._stock_function(self._as_stock(layer), x))

    def _computes_itself(self) -> bool:
        """Whether the block makes the calls of the stock class itself, perhaps with one ReLU more."""
        return self.roles.itself or (self.relu_up and self.roles.factor is None)

    def _as_stock(self, down: Any = None) -> Any:
        """What the forward of the stock class is given for ``self``; with ``down`` for the down projection.

        With it the block computes what is its own, such as a dropout in training.
        """
        module, roles, topk = self._unguarded(), self.roles, self.topk
        children: dict[str, Any] = {} if down is None else {roles.down: down}
        if topk is not None:
            layer = self._child(roles.down) if down is None else down
            children[roles.down] = lambda h: layer(topk(h))
        if self.relu_up:
            assert roles.factor is not None
            up = self._child(roles.factor)
            children[roles.factor] = lambda x: self._rectified(up(x))
        return StandIn(module, children) if children else module

    def hidden(self, x: Tensor) -> Tensor:
        """What reaches the down projection, by calls of the modules: ``x [..., D] -> [..., F]``.

        With ``relu_up`` as far as that is mixed in.
        """
        p, u = self.roles.project(self._child, x)
        a = self.activation(p)
        return self._selected(cast(Tensor, a) if u is None else self._product(a, self._rectified(u)))

    def _product(self, a: Tensor, u: Tensor) -> Tensor:
        # In place where nobody else can hold the activation's output: for many tokens, another tensor of this
        # size means new pages.
        shared = self.kernel() is None or getattr(self.activation, "inplace", False)
        if torch.is_grad_enabled() or shared or a.dtype != u.dtype:
            return a * u
        return a.mul_(u)

    def skip_in_training(self, max_density: float) -> bool:
        """Skip with gradient up to this share of active pairs; whether it could as it is now.

        It never does where the forward of the class has more than the formula in training.
        """
        formula = self.roles.itself or computes(self._stock[0], self.roles, training=True)
        self.trained_density = max_density if formula else 0.0
        return self.trained_density > 0 and can_be_trained(self)

    def prepare(self, *, certify: bool) -> None:
        """Store the down projection neuron-major and certify; else the first call that skips does so."""
        self._certified.wanted = certify = certify and self.certifiable
        self._certified.drop()
        if not self.gives_zeros:
            return
        readable = self.readable(self.roles.down) is not None or self.skips_int8
        if readable and self._may_lend() and self._is_linear_down():
            lend(cast(Tensor, self._down_weight()))
        since = self._certified.mark
        if certify and self._certified.may_serve(self, self._stock, 1) and (first := self.deciding()):
            self._certified.for_one_token(self, first.weight, since)

    @property
    def certifiable(self) -> bool:
        """Whether a certificate can say which neurons are silent: not with a selection, nor with CATS."""
        kernel = self.kernel()
        return not self.selects and (kernel is None or TABLE[kernel[0]].certifiable)

    def worth_certifying(self) -> Tensor | None:
        """The weight ``[F, D]`` that decides which neurons are active, if a certificate of it pays."""
        first = self.deciding() if self.certifiable and self.kernel() is not None else None
        if first is None or self._certified.backend(self, first.weight) == DENSE:
            return None
        return first.weight

    @property
    def certify(self) -> bool:
        """Whether single tokens are decoded with a certificate, as :func:`hf_sparse.prepare` was asked."""
        return self._certified.wanted

    def __getstate__(self) -> dict[str, Any]:
        certified = Certified()  # a copy has weights of its own
        certified.wanted = self.certify
        return {**super().__getstate__(), "_certified": certified}

    def deciding(self) -> nn.Linear | Conv1D | None:
        """The layer that decides which neurons are active, if there is such a one and it may be read."""
        name = self.roles.deciding
        return None if name is None else self.readable(name)

    def owns(self, name: str | None) -> bool:
        """Whether nobody else holds the linear layer ``name``, its weight or its memory.

        Then no change of it goes unnoticed, and its layout is nobody's business. Not to be asked while a
        variable of the caller holds it.
        """
        if name is None or (self.readable(name) is None and int8_layer(self._child(name)) is None):
            return False
        return holds_layer_alone(self._modules, self._stock, name)

    @property
    def is_held(self) -> bool:
        """Whether only a holder of the down projection, or of its memory, keeps the block from skipping."""
        readable = self.readable(self.roles.down) is not None or self.skips_int8
        return readable and not self._may_lend()

    @property
    def skips_int8(self) -> bool:
        """As of any block; what holds its weights is not asked."""
        if self.selects or self.kernel() is None:
            return False
        return all(int8_layer(self._child(name)) for name in (*self.roles.before_down, self.roles.down))

    def problems(self) -> tuple[list[Problem], str | None]:
        if not self.gives_zeros:
            return [], "its activation is not exactly zero, or has a hook"
        form, down = self.roles.form, self.readable(self.roles.down)
        whole = not self.selects and all(self.readable(name) is not None for name in self.roles.before_down)
        forms: list[tuple[Form, bool]] = [(form, False)] if whole else []
        if form == "plain" or self.selects:
            forms.append(("linear", False))
        if down is None or not forms:
            return [], "its linear layers must be called (an adapter, a hook, quantised or offloaded weights)"
        if self.certify and whole and self.certifiable and self.roles.deciding is not None:
            forms.append((form, True))
        sizes, weight = self.roles.sizes(self), down.weight
        return [Problem(form, *sizes, weight.dtype, weight.device.type, c) for form, c in forms], None

    def _may_lend(self) -> bool:
        """Whether the down projection may be stored neuron by neuron, or is; asked before it is fetched."""
        weight = self._down_weight()
        if weight is None or is_lent(weight) or not self._is_linear_down():
            return weight is not None
        del weight
        return self.owns(self.roles.down)

    def read(self, x: Tensor, *names: str, trained: bool = False) -> list[Linear] | None:
        """Weight and bias of the children ``names``, to be read for ``x``; None if one must be called.

        To be ``trained`` they may have any strides, and under autocast another dtype.
        """
        casts = trained and autocasts(x.device.type)
        if hooks_on_all_modules():
            return None
        found: list[Linear] = []
        for name in names:
            linear = self.readable(name, transposed=trained)
            if linear is None:
                return None
            parameters = linear._parameters  # as attributes each takes a call of __getattr__
            weight = cast(nn.Parameter, parameters["weight"])
            if weight.device != x.device or not (weight.dtype == x.dtype or casts):
                return None
            found.append((weight if isinstance(linear, nn.Linear) else weight.t(), parameters["bias"]))
        return found

    def _is_linear_down(self) -> bool:
        return isinstance(self._modules[self.roles.down], nn.Linear)

    def readable(self, name: str, *, transposed: bool = False) -> nn.Linear | Conv1D | None:
        """The child ``name`` if its weight may be read directly, None if it must be called as a module.

        LoRA, quantised, offloaded, tensor-parallel and hooked layers all fail one of these tests, which is
        what makes skipping right for them: they are called, and do what they do. A ``Conv1D`` stores the
        transposed weight: as a down projection it is neuron-major as it comes, elsewhere of no use but to who
        takes it ``transposed``.
        """
        linear = cast(nn.Linear | Conv1D, self._modules[name])
        if not only_multiplies(linear, transposed=transposed or name == self.roles.down):
            return None
        return linear if is_plain(linear._parameters.get("weight")) else None


class SparseGatedMLP(SparseMLP):
    """``down(act(gate(x)) * up(x))``; the gate decides what is read of the other two."""


class SparsePlainMLP(SparseMLP):
    """``down(act(up(x)))``; the up projection decides which rows of the down projection are read."""
