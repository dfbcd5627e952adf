"""MLP blocks that skip silent neurons in inference, and are the stock block in every other respect.

A sparse block *holds the children of the block it replaces*, under their own names: parameters, state dict
keys, LoRA targets and tensor-parallel plans stay as they were, and nothing is copied. Its dense path is the
forward of the stock class itself, so an unchanged activation gives bit-identical outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import triton_ops
from hf_sparse.activations import MixedActivation, kernel_kind
from hf_sparse.adapters.roles import Roles
from hf_sparse.modules.certified import HeldCertificate
from hf_sparse.modules.hooked import carry_device_hook
from triton_ops import dispatch
from triton_ops.break_even import Kind
from triton_ops.layout import stock_layout_

# What belongs to one module object and is not taken over from the stock block.
_NOT_SHARED = ("_modules", "forward", "_old_forward", "_hf_hook")


class SparseMLP(nn.Module):
    """Common part of :class:`SparseGatedMLP` and :class:`SparsePlainMLP`.

    Args:
        stock: the block to stand in for; it is not changed.
        roles: names of its children by part.
        activation: takes the place of the stock activation, ``[..., F] -> [..., F]``.
        certify: decode single tokens with a certificate, as ``SparsityConfig.certify`` says.

    """

    roles: Roles
    density: float | None
    """Mean share of active neurons per token, as :func:`hf_sparse.tune` measured it; None if it did not."""

    def __init__(
        self, stock: nn.Module, roles: Roles, activation: nn.Module, *, certify: bool = False
    ) -> None:
        super().__init__()
        # Sizes, flags, hooks and whatever else the stock forward reads from self.
        self.__dict__.update({k: v for k, v in vars(stock).items() if k not in _NOT_SHARED})
        self._modules = {**stock._modules, roles.act: activation}
        self.roles = roles
        self._stock = (stock,)  # in a tuple, so that it is not registered as a child
        self.certify = certify
        self.density = None
        self._held: HeldCertificate | None = None
        carry_device_hook(stock, self)

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
        self._held = None
        (stock,) = self._stock
        down = self._child(self.roles.down)
        if type(down) is nn.Linear and triton_ops.is_neuron_major(down.weight):
            stock_layout_(down.weight)
        for name, child in self._modules.items():
            if name != self.roles.act:
                stock._modules[name] = child
        stock.training = self.training
        carry_device_hook(self, stock)
        return stock

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D] -> [..., D]``, any floating dtype."""
        if torch.is_grad_enabled() or self.training:
            return self.dense(x)
        return self._skip_silent(x)

    def dense(self, x: Tensor) -> Tensor:
        """The block with every neuron, as the stock class computes it.

        Without gradient, where torch multiplies slowly with a weight in the layout for decoding, the down
        projection is :func:`triton_ops.sparse_linear`, which is made for that layout.
        """
        inference = not (self.training or torch.is_grad_enabled())
        if inference and (read := self._weights(x, self.roles.down)) is not None:
            ((down, bias),) = read
            if triton_ops.is_neuron_major(down) and triton_ops.wants_product(down):
                return triton_ops.sparse_linear(self.hidden(x), down, bias)
        self._store_for_torch()
        return self._stock_forward(x)

    def _store_for_torch(self) -> None:
        """Give the down projection its stock layout back where torch cannot do without."""
        down = self._child(self.roles.down)
        if (
            not torch.compiler.is_compiling()
            and type(down) is nn.Linear
            and dispatch.torch_stalls(down.weight.device.type, down.weight.dtype)
            and triton_ops.is_neuron_major(down.weight)
        ):
            stock_layout_(down.weight)

    def _stock_forward(self, x: Tensor) -> Tensor:
        return self.stock_class.forward(self, x)

    def hidden(self, x: Tensor) -> Tensor:
        """What reaches the down projection, by calls of the modules: ``x [..., D] -> [..., F]``."""
        return self.activation(self._child(self.deciding)(x))

    def _skip_silent(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _child(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])

    def prepare(self) -> None:
        """Store the down projection neuron-major and certify anew; else the first call that skips does so."""
        self._held = None
        if self.kernel() is None:
            return
        if (down := self.readable(self.roles.down)) is not None:
            prepare_down(down.weight)
        if (first := self.readable(self.deciding)) is not None:
            self._certificate(1, first.weight)

    def train(self, mode: bool = True) -> SparseMLP:
        """Training mode runs dense and changes the weights: a certificate is of no use there."""
        if mode:
            self._held = None
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            # PEFT puts its layer in the place of one of ours, and ours back after changing its weight through
            # .data, which counts no version.
            self.__dict__["_held"] = None
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseMLP:
        self._held = None  # .to(), .half(), ... put new values into the weight, uncounted
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # a copy or a pickle has weights of its own

    @property
    def deciding(self) -> str:
        """The name of the projection that decides which neurons are active."""
        return self.roles.gate or self.roles.up

    def _wants(self, tokens: int, weight: Tensor, kind: Kind) -> bool:
        density = 1.0 if self.density is None else self.density
        return triton_ops.wants_sparse(tokens, weight, kind, density=density)

    def _certificate(self, tokens: int, weight: Tensor) -> HeldCertificate | None:
        """The certificate to decode with, made if need be; None where it is not wanted, or cannot be had.

        ``weight [F, D]`` is that of the deciding projection. To ask for certificates is to say that the model
        is sparse; where the density was measured, that decides.
        """
        density = 0.0 if self.density is None else self.density
        if not self.certify or tokens != 1:
            return None
        if not triton_ops.wants_sparse(1, weight, self.roles.kind, certified=True, density=density):
            return None
        # A graph can neither make a certificate nor ask a weight for its version; there the operator does.
        if not torch.compiler.is_compiling() and not (self._held and self._held.holds_for(weight)):
            self._held = HeldCertificate.make(weight)
        return self._held

    def kernel(self) -> tuple[str, float] | None:
        """What the kernels call the activation; None if it must be called as a module."""
        act = self.activation
        hooked = (
            act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act) or hooks_on_all_modules()
        )
        return None if hooked else kernel_kind(act)

    def _weights(self, x: Tensor, *names: str) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weight and bias of the children ``names``, to be read for ``x``; None if one must be called."""
        if dispatch.autocasts(x.device.type) or hooks_on_all_modules():
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
            found.append((weight, parameters["bias"]))
        return found

    def readable(self, name: str) -> nn.Linear | None:
        """The child ``name`` if its weight may be read directly, None if it must be called as a module.

        LoRA, quantised, offloaded, tensor-parallel and hooked layers all fail one of these tests, which is
        what makes skipping right for them: they are called, and do what they do.
        """
        linear = self._modules[name]
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return None
        own = linear._parameters
        if "forward" in vars(linear) or type(own.get("weight")) is not nn.Parameter or "bias" not in own:
            return None
        return linear


class SparseGatedMLP(SparseMLP):
    """``down(act(gate(x)) * up(x))``; with ``relu_up`` also ``relu`` on the up projection (dReLU)."""

    def __init__(
        self,
        stock: nn.Module,
        roles: Roles,
        activation: nn.Module,
        *,
        certify: bool = False,
        relu_up: bool = False,
    ) -> None:
        super().__init__(stock, roles, activation, certify=certify)
        self.relu_up = relu_up

    def _stock_forward(self, x: Tensor) -> Tensor:
        # With relu_up the same calls with one ReLU more.
        return self._child(self.roles.down)(self.hidden(x)) if self.relu_up else super()._stock_forward(x)

    def hidden(self, x: Tensor) -> Tensor:
        """``act(gate(x)) * up(x)``, with ``relu_up`` as far as it is mixed in."""
        a, u = super().hidden(x), self._child(self.roles.up)(x)
        if self.relu_up:
            k = self.mix
            u = torch.relu(u) if k == 1 else (1 - k) * u + k * torch.relu(u)
        # In place where nobody else can hold the activation's output: for many tokens, another tensor of this
        # size means new pages.
        shared = self.kernel() is None or getattr(self.activation, "inplace", False)
        if torch.is_grad_enabled() or shared or a.dtype != u.dtype:
            return a * u
        return a.mul_(u)

    def _skip_silent(self, x: Tensor) -> Tensor:
        kind = self.kernel()
        read = self._weights(x, self.deciding, self.roles.up, self.roles.down)
        if kind is None or read is None:
            return self.dense(x)
        (gate, gate_bias), (up, up_bias), (down, down_bias) = read
        tokens = x.numel() // x.shape[-1]
        held = self._certificate(tokens, gate)
        if held is None and not self._wants(tokens, gate, "gated"):
            return self.dense(x)
        prepare_down(down)
        name, threshold = ("drelu", 0.0) if self.relu_up else kind
        return triton_ops.gated_mlp(
            x,
            gate,
            up,
            down,
            gate_bias,
            up_bias,
            down_bias,
            activation=name,
            threshold=threshold,
            certificate=held.certificate if held else None,
            stamp=held.stamp if held else None,
        )


class SparsePlainMLP(SparseMLP):
    """``down(act(up(x)))``; the up projection decides which rows of the down projection are read."""

    def _skip_silent(self, x: Tensor) -> Tensor:
        kind = self.kernel()
        last = self._weights(x, self.roles.down)
        if kind is None or last is None:
            return self.dense(x)
        ((down, down_bias),) = last
        tokens = x.numel() // x.shape[-1]
        if (first := self._weights(x, self.roles.up)) is not None:
            ((up, up_bias),) = first
            held = self._certificate(tokens, up)
            if held is not None or self._wants(tokens, up, "plain"):
                prepare_down(down)
                name, threshold = kind
                return triton_ops.plain_mlp(
                    x,
                    up,
                    down,
                    up_bias,
                    down_bias,
                    activation=name,
                    threshold=threshold,
                    certificate=held.certificate if held else None,
                    stamp=held.stamp if held else None,
                )
        # Where the up projection must be called, or there are too many tokens for the fused operator to pay.
        if not self._wants(tokens, down, "linear"):
            return self.dense(x)
        prepare_down(down)
        return triton_ops.sparse_linear(self.hidden(x), down, down_bias)


def hooks_on_all_modules() -> bool:
    """Whether hooks are to be called with every module, as ``register_module_forward_hook`` asks."""
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def prepare_down(down: Tensor) -> None:
    """Store the weight of a down projection neuron-major, once: same values and shape, other strides.

    Not while compiling: a graph must not change its own inputs, and the operators are right either way.
    """
    if not torch.compiler.is_compiling() and not triton_ops.is_neuron_major(down):
        triton_ops.neuron_major_(down)
