"""Stacked experts that skip the silent neurons of those that a token is routed to.

With gradient, or where nothing is to be skipped, the forward of the stock class runs, which honours the
``experts_implementation`` of the model. Else each expert that is hit is an MLP for the operators.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import triton_ops
from hf_sparse.activations.config import same_function
from hf_sparse.adapters.experts import Experts, Routed, project, routing
from hf_sparse.adapters.roles import Roles, Site, Watcher, shape
from hf_sparse.modules.ownership import give_back, holds_alone, is_lent, lend
from hf_sparse.modules.sparse_block import SparseBlock, Way
from hf_sparse.modules.surroundings import overridden, transformed
from triton_ops import DENSE, Problem
from triton_ops.problem import Form

_SAME = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
"""The implementations that compute the forward of the class; others may compute anything."""


class SparseExperts(SparseBlock):
    """In the place of a module of stacked experts; it holds their parameters."""

    roles: Experts
    down_shape: tuple[int, ...]
    """Of the down projections, when the block was patched."""

    def __init__(
        self, stock: nn.Module, roles: Roles, activation: nn.Module, *, relu_up: bool = False
    ) -> None:
        super().__init__(stock, roles, activation, relu_up=relu_up)
        self.down_shape = shape(getattr(stock, self.roles.down))
        self._watchers: OrderedDict[int, tuple[Site, Watcher]] = OrderedDict()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``x [T, D]``, expert numbers ``[T, k]`` and their weights ``[T, k]`` to ``[T, D]``."""
        if "forward" in self.__dict__:
            self._forward_ran = True
        call = routing(self._stock_function, args, kwargs)
        way = self._way(call)
        if way is None and not self._computes_itself() and not self._watchers:
            return cast(Tensor, self._stock_function(self._unguarded(), *args, **kwargs))
        if way is None or way.form == "linear" or self._watchers:
            return self._each(call, None if self._watchers else way)
        name, threshold = way.activation
        operator: Any = triton_ops.routed_mlp
        return operator(*call, *way.weights, activation=name, threshold=threshold, backend=way.backend)

    def dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The experts with every neuron, as the stock class computes them."""
        if self._computes_itself():
            return self._each(routing(self._stock_function, args, kwargs), None)
        return cast(Tensor, self._stock_function(self._unguarded(), *args, **kwargs))

    def _computes_itself(self) -> bool:
        """Whether the forward of the stock class would compute something else."""
        if self.relu_up or self.topk is not None:
            return True
        return self.roles.written is not None and not same_function(self.activation, self.original_activation)

    def watch(self, site: Site, fn: Watcher) -> RemovableHandle:
        """As :meth:`hf_sparse.adapters.Block.watch`, for what is inside of the experts: p, a and h."""
        handle = RemovableHandle(self._watchers)
        self._watchers[handle.id] = (site, fn)
        return handle

    def _apply_gate(self, both: Tensor) -> Tensor:
        """For the implementations of transformers, where this block itself is given to them."""
        return cast(Tensor, cast(Any, self.stock_class)._apply_gate(self, both))

    def _way(self, call: Routed) -> Way | None:
        """How to skip in this call, with the layout made to fit; None if nothing is to be skipped."""
        compiling = torch.compiler.is_compiling()
        if not compiling and (transformed() or overridden()):
            return None
        if self.training or torch.is_grad_enabled():
            if not compiling:
                self.disclose()  # the weights belong to whoever trains them
            return None
        slots = call.experts.numel()
        if not self.gives_zeros or not self.nothing_else() or not self._readable(call.x) or not slots:
            return None
        if getattr(getattr(self, "config", None), "_experts_implementation", None) not in _SAME:
            return None
        lendable = compiling or self._may_lend()  # asked before a variable here holds a weight
        form = self._form()
        *first, (down, bias) = self.roles.weights(self._unguarded())
        plan = triton_ops.plan((down if form == "linear" else first[0][0])[0], form)
        backend = plan.backend(max(1, slots // len(down)), self.density)
        if backend != DENSE and not self.roles.transposed and not compiling:
            lent = lend(down) if lendable else None
            backend, down = (DENSE, down) if lent is None else (backend, lent)
        if backend != DENSE and triton_ops.is_neuron_major(down):
            if form == "linear":
                return Way(form, backend, (down, bias))
            (gate, gate_bias), (up, up_bias) = first if len(first) == 2 else (*first, (None, None))
            activation = self.kernel()
            assert activation is not None
            return Way(form, backend, (gate, up, down, gate_bias, up_bias, bias), activation)
        if plan.stalls and not compiling:
            give_back(down)
        return None

    def _form(self) -> Form:
        """What an expert is for the operators."""
        return self.roles.form if self.roles.is_plain_formula and not self.selects else "linear"

    def _each(self, call: Routed, way: Way | None) -> Tensor:
        """Expert by expert with the calls of the stock class, the down projection skipping by ``way``."""
        roles, module = self.roles, self._unguarded()
        count = roles.count(module)
        out = torch.zeros_like(call.x, dtype=torch.promote_types(call.x.dtype, torch.float32))
        seen: dict[Site, list[Tensor]] = {site: [] for site, _ in self._watchers.values()}
        rows: list[Tensor] = []
        for expert, tokens, weight in call.by_expert(sys.maxsize if roles.identity else count):
            y = call.x[tokens]
            if expert < count:
                inside = roles.inside(module, y, expert, self._rectified)
                inside = inside._replace(h=self._selected(inside.h))
                for site, values in seen.items():
                    values.append(getattr(inside, site))
                rows.append(tokens)
                if way is None:
                    y = project(module, roles.down, inside.h, expert, transposed=roles.transposed)
                else:
                    down, bias = cast(Tensor, way.weights[0]), way.weights[1]
                    own = None if bias is None else bias[expert]
                    y = triton_ops.sparse_linear(inside.h, down[expert], own, backend=way.backend)
                if roles.norm is not None:
                    y = self._child(roles.norm)(y)
            out = out.index_add(0, tokens, (y * weight).to(out.dtype))
        for site, fn in self._watchers.values():
            if rows:
                fn(torch.cat(seen[site]), torch.cat(rows))
        return out.to(call.x.dtype)

    def prepare(self, *, certify: bool) -> None:
        """Store the down projections neuron-major; experts have no certificates."""
        if self.gives_zeros and not self.roles.transposed and self._may_lend():
            weight = self._down_weight()
            assert weight is not None
            lend(weight)

    def problems(self) -> tuple[list[Problem], str | None]:
        if not self.gives_zeros:
            return [], "its activation is not exactly zero, or has a hook"
        weight = self._parameters.get(self.roles.down)
        if weight is None or not self._readable(weight):
            return [], "its parameters are not plain ones (parametrised, offloaded or sharded)"
        return [Problem(self._form(), *self.roles.sizes(self), weight.dtype, weight.device.type)], None

    @property
    def is_held(self) -> bool:
        if self.roles.transposed:  # neuron-major as they come
            return False
        weight = self._parameters.get(self.roles.down)
        readable = weight is not None and self._readable(weight)
        del weight
        return readable and not self._may_lend()

    def _may_lend(self) -> bool:
        """Whether the down projections may be stored neuron by neuron, or are; asked before fetching one."""
        name = self.roles.down
        weight = self._parameters.get(name)
        if weight is None or self.roles.transposed or is_lent(weight):
            return weight is not None
        del weight
        return holds_alone(self, self._stock, name)

    def _readable(self, like: Tensor) -> bool:
        """Whether all weights may be read directly, for an input such as ``like``."""
        if "parametrizations" in self._modules or getattr(self, "_is_expert_parallel", False):
            return False
        if "forward" in vars(self) and getattr(getattr(self, "_hf_hook", None), "offload", True):
            return False
        weights = [self._parameters.get(name) for name in (self.roles.first, self.roles.down)]
        return all(
            type(weight) is nn.Parameter and weight.dtype == like.dtype and weight.device == like.device
            for weight in weights
        )

    def _down_weight(self) -> Tensor | None:
        return None if self.roles.transposed else self._parameters.get(self.roles.down)
