"""MLP blocks that skip silent neurons in inference, and are the stock block in every other respect.

A sparse block *holds the children of the block it replaces*, under their own names: parameters, state dict
keys, LoRA targets and tensor-parallel plans stay as they were, and nothing is copied. Its dense path is the
forward of the stock class itself, so an unchanged activation gives bit-identical outputs.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

import triton_ops
from hf_sparse.activations import MixedActivation, row_of
from hf_sparse.adapters.block import replaced_forward
from hf_sparse.adapters.roles import Roles
from hf_sparse.modules.certified import Certified
from hf_sparse.modules.guarded import GuardedModule
from hf_sparse.modules.hooked import carry_device_hook
from hf_sparse.modules.leaf import ParameterLeaf
from hf_sparse.modules.ownership import give_back, held_elsewhere, is_lent, lend, shares_nothing
from hf_sparse.modules.surroundings import has_own_forward, overridden, transformed
from triton_ops import DENSE, Certificate
from triton_ops.problem import Form

# What belongs to one module object and is not taken over from the stock block.
_NOT_SHARED = ("_modules", "forward", "_old_forward", "_hf_hook")


class Way(NamedTuple):
    """How a block runs one call."""

    form: Form | None = None
    """The operator, with ``"linear"`` after modules have computed h; None: the forward of the stock class."""
    backend: str = DENSE
    """What the operator has to use."""
    weights: tuple[Tensor | None, ...] = ()
    """What it gets after its input."""
    activation: tuple[str, float] = ("", 0.0)
    """Its name and threshold."""
    certificate: tuple[Certificate, tuple[int, int]] | None = None
    """And its stamp."""


_STOCK = Way()


class SparseMLP(GuardedModule):
    """Common part of :class:`SparseGatedMLP` and :class:`SparsePlainMLP`.

    Args:
        stock: the block to stand in for; it is not changed.
        roles: names of its children by part.
        activation: takes the place of the stock activation, ``[..., F] -> [..., F]``.

    """

    roles: Roles
    relu_up = False
    """Whether the up projection goes through ReLU as well."""
    density: float | None
    """Mean share of active neurons per token, as :func:`hf_sparse.tune` measured it; None if it did not."""

    def __init__(self, stock: nn.Module, roles: Roles, activation: nn.Module) -> None:
        super().__init__()
        # Sizes, flags, hooks and whatever else the stock forward reads from self.
        self.__dict__.update({k: v for k, v in vars(stock).items() if k not in _NOT_SHARED})
        self._modules = {**stock._modules, roles.act: activation}
        self.roles = roles
        self._stock = (stock,)  # in a tuple, so that it is not registered as a child
        # The function that was recognised: other tools replace that of the class.
        self._stock_function = type(stock).forward
        self.density = None
        self._certified = Certified()
        self._forward_ran = False
        carry_device_hook(stock, self)

    @property
    def stock(self) -> nn.Module:
        """The block that this one stands for, with the children that it had."""
        self.disclose()
        return self._stock[0]

    @property
    def stock_class(self) -> type[nn.Module]:
        return type(self._stock[0])

    @property
    def activation(self) -> nn.Module:
        """The activation in place."""
        return self._child(self.roles.act)

    @property
    def original_activation(self) -> nn.Module:
        """The activation that the block came with."""
        return self._stock[0].get_submodule(self.roles.act)

    @property
    def mix(self) -> float:
        """Share of the new activation; 1 outside of a finetune that mixes."""
        act = self.activation
        return act.k if isinstance(act, MixedActivation) else 1.0

    def set_mix(self, k: float) -> None:
        """Set the share of the new activation, 0 <= k <= 1."""
        act = self.activation
        new = act.new if isinstance(act, MixedActivation) else act
        self._modules[self.roles.act] = new if k == 1 else MixedActivation(self.original_activation, new, k)

    def restore(self) -> nn.Module:
        """The stock block with its own activation and this block's linear layers as they are now."""
        self.disclose()
        (stock,) = self._stock
        for name, child in self._modules.items():
            if name != self.roles.act and not isinstance(child, ParameterLeaf):
                stock._modules[name] = child
        stock.training = self.training
        carry_device_hook(self, stock)
        return stock

    def disclose(self) -> None:
        """Give the down projection its stock layout back, and drop the certificate."""
        self._certified.drop()
        weight = self._child(self.roles.down)._parameters.get("weight")
        if weight is not None:
            give_back(weight)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, if the forward that runs is this block's.

        Raises:
            RuntimeError: another tool has replaced it.

        """
        if "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)
        self._forward_ran = False
        output = super().__call__(*args, **kwargs)
        if not self._forward_ran:
            raise RuntimeError(
                f"this {self.stock_class.__name__} was patched, and then its forward was replaced by "
                f"{replaced_forward(self)} (Liger and kernel mappings do so), which does not compute what "
                "the model's config says. Turn that off for the MLP, or hf_sparse.unpatch(model) first."
            )
        return output

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; a warning if what is saved is not what another tool makes of it."""
        if by := replaced_forward(self):
            warnings.warn(
                f"the forward of this {self.stock_class.__name__} was replaced by {by}: what is saved "
                "computes what the config says, and not that.",
                stacklevel=2,
            )
        return super().state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D] -> [..., D]``, any floating dtype."""
        if "forward" in self.__dict__:
            self._forward_ran = True
        return self._run(x, self._way(x))

    def dense(self, x: Tensor) -> Tensor:
        """The block with every neuron, as the stock class computes it, to rounding.

        Without gradient, where torch multiplies slowly with a weight in the layout for decoding, the down
        projection is :func:`triton_ops.sparse_linear`, which is made for that layout.
        """
        return self._run(x, self._way(x, skip=False))

    def _way(self, x: Tensor, *, skip: bool = True) -> Way:
        """How to run this call; all that decides it is asked here, once, and the layout is made to fit.

        The whole block is one operator if the kernels know the activation and all weights may be read, and
        skipping pays. The down projection alone may skip, too: where a projection before it must be called
        (an adapter), and in a plain block where there are too many tokens for the whole to pay.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and (transformed() or overridden()):
            return _STOCK
        if self.training or torch.is_grad_enabled():
            if not compiling:
                self.disclose()  # the weights belong to whoever trains them
            return _STOCK
        tokens = x.numel() // x.shape[-1]
        # Asked before a variable here holds a weight.
        certify, lendable = skip and self._may_certify(tokens), compiling or self._may_lend()
        read = self._weights(x, self.roles.down)
        if read is None:
            return _STOCK
        ((down, bias),) = read
        activation = self.kernel() if skip else None
        called = None if activation is None else self._weights(x, *self.roles.before_down)
        if activation is not None and called is not None:
            first = self.roles.split(called)
            deciding, held, form = first[0][0], None, self.roles.form
            if certify:
                backend, held = self._certificate(deciding)
            if held is None:
                backend = triton_ops.plan(deciding, form).backend(tokens, self.density)
            if backend != DENSE and lendable and (rows := neuron_major(down)) is not None:
                weights = (*[w for w, _ in first], rows, *[b for _, b in first], bias)
                return Way(form, backend, weights, activation, held)
        plan = triton_ops.plan(down, "linear")
        if activation is not None and (called is None or self.roles.form == "plain"):
            backend = plan.backend(tokens, self.density)
            if backend != DENSE and lendable and (rows := neuron_major(down)) is not None:
                return Way("linear", backend, (rows, bias))
        if plan.product != DENSE and self._is_linear_down() and triton_ops.is_neuron_major(down):
            # A view: another thread may give the weight back meanwhile.
            return Way("linear", plan.product, (down if compiling else down.detach(), bias))
        if plan.stalls and not compiling:
            give_back(down)
        return _STOCK

    def _run(self, x: Tensor, way: Way) -> Tensor:
        if way.form is None:
            return self._stock_forward(x)
        if way.form == "linear":
            down, bias = way.weights
            return triton_ops.sparse_linear(self.hidden(x), cast(Tensor, down), bias, backend=way.backend)
        operator: Any = triton_ops.gated_mlp if way.form == "gated" else triton_ops.plain_mlp
        name, threshold = way.activation
        certificate, stamp = way.certificate or (None, None)
        return operator(
            x,
            *way.weights,
            activation=name,
            threshold=threshold,
            certificate=certificate,
            stamp=stamp,
            backend=way.backend,
        )

    def _stock_forward(self, x: Tensor) -> Tensor:
        return self._stock_function(self._unguarded(), x)

    def _unguarded(self) -> nn.Module:
        """This block as an object of the stock class: the same attributes, nothing disclosed by their use."""
        if torch.compiler.is_compiling():
            return self
        view = object.__new__(self.stock_class)
        object.__setattr__(view, "__dict__", self.__dict__)
        return view

    def hidden(self, x: Tensor) -> Tensor:
        """What reaches the down projection, by calls of the modules: ``x [..., D] -> [..., F]``."""
        return self.roles.hidden(self._child, x)

    def _child(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])

    def prepare(self, *, certify: bool) -> None:
        """Store the down projection neuron-major and certify; else the first call that skips does so."""
        self._certified.wanted = certify
        self._certified.drop()
        if self.kernel() is None:
            return
        if self._may_lend() and self._is_linear_down() and (down := self.readable(self.roles.down)):
            lend(down.weight)
        if certify and self.owns(self.roles.deciding) and (first := self._deciding()) is not None:
            self._certificate(cast(Tensor, first.weight))

    @property
    def certify(self) -> bool:
        """Whether single tokens are decoded with a certificate, as :func:`hf_sparse.prepare` was asked."""
        return self._certified.wanted

    def __getstate__(self) -> dict[str, Any]:
        certified = Certified()  # a copy has weights of its own
        certified.wanted = self.certify
        return {**super().__getstate__(), "_certified": certified}

    def _deciding(self) -> nn.Module | None:
        """The layer that decides which neurons are active, if there is such a one and it may be read."""
        name = self.roles.deciding
        return None if name is None else self.readable(name)

    def owns(self, name: str | None) -> bool:
        """Whether nobody else holds the linear layer ``name``, its weight or its memory.

        Then no change of it goes unnoticed, and its layout is nobody's business. Not to be asked while a
        variable of the caller holds it.
        """
        modules = self._modules
        if name is None or self.readable(name) is None:
            return False
        # The stock block is the second holder of the layer.
        if held_elsewhere(self._stock, 0) or held_elsewhere(modules, name, holders=2):
            return False
        if held_elsewhere(vars(modules[name]), "_parameters"):  # as an iterator over it does
            return False
        parameters: dict[str, Any] = self._child(name)._parameters
        return not held_elsewhere(parameters, "weight") and shares_nothing(parameters["weight"])

    def _may_certify(self, tokens: int) -> bool:
        """Whether a certificate may be used for so many tokens; to be asked before fetching the weights."""
        if not self.certify or torch.compiler.is_compiling():
            return self.certify and tokens == 1
        if not self.owns(self.roles.deciding):
            self._certified.drop()  # whoever holds it now may have changed it when this is asked again
            return False
        return tokens == 1

    @property
    def is_held(self) -> bool:
        """Whether only a holder of the down projection, or of its memory, keeps the block from skipping."""
        return self.readable(self.roles.down) is not None and not self._may_lend()

    def _may_lend(self) -> bool:
        """Whether the down projection may be stored neuron by neuron, or is; asked before it is fetched."""
        weight = self._child(self.roles.down)._parameters.get("weight")
        if weight is None or is_lent(weight) or not self._is_linear_down():
            return weight is not None
        del weight
        return self.owns(self.roles.down)

    def _certificate(self, weight: Tensor) -> tuple[str, tuple[Certificate, tuple[int, int]] | None]:
        """The backend for one token with a certificate of the deciding projection ``[F, D]``, and that.

        It is made if need be; none where it does not pay, or cannot be had.
        """
        plan = triton_ops.plan(weight, self.roles.form, certified=True)
        backend = plan.backend(1, self.density)
        return backend, None if backend == DENSE else self._certified.of(weight)

    def kernel(self) -> tuple[str, float] | None:
        """What the kernels call the activation; None if it must be called as a module."""
        act = self.activation
        hooked = (
            act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act) or hooks_on_all_modules()
        )
        return None if hooked else row_of(act, relu_up=self.relu_up)

    def _weights(self, x: Tensor, *names: str) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weight and bias of the children ``names``, to be read for ``x``; None if one must be called."""
        if hooks_on_all_modules():
            return None
        found: list[tuple[Tensor, Tensor | None]] = []
        for name in names:
            linear = self.readable(name)
            if linear is None:
                return None
            parameters = linear._parameters  # as attributes each takes a call of __getattr__
            weight = cast(nn.Parameter, parameters["weight"])
            if weight.dtype != x.dtype or weight.device != x.device:
                return None
            found.append((weight if type(linear) is nn.Linear else weight.t(), parameters["bias"]))
        return found

    def _is_linear_down(self) -> bool:
        return type(self._modules[self.roles.down]) is nn.Linear

    def readable(self, name: str) -> nn.Linear | Conv1D | None:
        """The child ``name`` if its weight may be read directly, None if it must be called as a module.

        LoRA, quantised, offloaded, tensor-parallel and hooked layers all fail one of these tests, which is
        what makes skipping right for them: they are called, and do what they do. A ``Conv1D`` stores the
        transposed weight: as a down projection it is neuron-major as it comes, elsewhere of no use.
        """
        linear = cast(nn.Linear | Conv1D, self._modules[name])
        if not has_own_forward(linear) or (type(linear) is Conv1D and name != self.roles.down):
            return None
        if linear._forward_hooks or linear._forward_pre_hooks:
            return None
        own = linear._parameters
        if "forward" in vars(linear) or type(own.get("weight")) is not nn.Parameter or "bias" not in own:
            return None
        return linear


class SparseGatedMLP(SparseMLP):
    """``down(act(gate(x)) * up(x))``; with ``relu_up`` also ``relu`` on the up projection (dReLU)."""

    def __init__(
        self, stock: nn.Module, roles: Roles, activation: nn.Module, *, relu_up: bool = False
    ) -> None:
        super().__init__(stock, roles, activation)
        self.relu_up = relu_up

    def _stock_forward(self, x: Tensor) -> Tensor:
        # With relu_up the same calls with one ReLU more.
        return self._child(self.roles.down)(self.hidden(x)) if self.relu_up else super()._stock_forward(x)

    def hidden(self, x: Tensor) -> Tensor:
        """``act(gate(x)) * up(x)``, with ``relu_up`` as far as it is mixed in."""
        p, u = self.roles.project(self._child, x)
        assert u is not None
        a = self.activation(p)
        if self.relu_up:
            k = self.mix
            u = torch.relu(u) if k == 1 else (1 - k) * u + k * torch.relu(u)
        # In place where nobody else can hold the activation's output: for many tokens, another tensor of this
        # size means new pages.
        shared = self.kernel() is None or getattr(self.activation, "inplace", False)
        if torch.is_grad_enabled() or shared or a.dtype != u.dtype:
            return a * u
        return a.mul_(u)


class SparsePlainMLP(SparseMLP):
    """``down(act(up(x)))``; the up projection decides which rows of the down projection are read."""


def hooks_on_all_modules() -> bool:
    """Whether hooks are to be called with every module, as ``register_module_forward_hook`` asks."""
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def neuron_major(down: Tensor) -> Tensor | None:
    """The weight of a down projection stored neuron-major: same values and shape, other strides.

    None where its layout must stay. While compiling it is what it is: a graph must not change its own inputs,
    and the operators are right either way.
    """
    return down if torch.compiler.is_compiling() else lend(down)
