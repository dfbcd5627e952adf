"""What every patched block has in common: it stands for a stock one, and is that in all but its activation.

A sparse block *holds the children and parameters of the block it replaces*, under their own names: state dict
keys, LoRA targets and tensor-parallel plans stay as they were, and nothing is copied. Its dense path is the
forward of the stock class itself, so an unchanged activation gives bit-identical outputs.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from hf_sparse.activations import MixedActivation, StatisticalTopK, row_of
from hf_sparse.activations.mixed import mixed
from hf_sparse.activations.topk import TopK
from hf_sparse.adapters.block import replaced_forward
from hf_sparse.adapters.roles import Roles
from hf_sparse.errors import PatchError
from hf_sparse.modules.guarded import GuardedModule
from hf_sparse.modules.hooked import carry_hooks
from hf_sparse.modules.leaf import ParameterLeaf
from hf_sparse.modules.ownership import any_lent, give_back
from triton_ops import DENSE, Certificate, Int8Weight, Problem
from triton_ops.problem import Form

# What belongs to one module object and is not taken over from the stock block.
_NOT_SHARED = ("_modules", "forward", "_old_forward", "_hf_hook", "_compiled_call_impl")


class Way(NamedTuple):
    """How a block runs one call."""

    form: Form | Literal["int8", "trained"] | None = None
    """The operator, with ``"linear"`` after modules have computed h; None: the forward of the stock class."""
    backend: str = DENSE
    """What the operator has to use."""
    weights: tuple[Tensor | Int8Weight | None, ...] = ()
    """What it gets after its input."""
    activation: tuple[str, float] = ("", 0.0)
    """Its name and threshold."""
    certificate: tuple[Certificate, tuple[int, int]] | None = None
    """And its stamp."""


class SparseBlock(GuardedModule):
    """In the place of a stock block; :class:`SparseMLP` and :class:`SparseExperts` say how it runs.

    Args:
        stock: the block to stand in for; it is not changed.
        roles: names of its parts.
        activation: takes the place of the stock activation, ``[..., F] -> [..., F]``.
        relu_up: whether the up projection of a gated block goes through ReLU as well (dReLU).

    """

    roles: Roles
    relu_up: bool
    leaves: dict[str, Literal["x", "y"]]
    """Children of ours that the block calls with its input (``"x"``) or output (``"y"``), to go on with
    what they give."""
    topk: TopK | None
    """What is kept of h, the input of the down projection; None if all of it is."""
    others: tuple[str, ...]
    """The names of the parts that it was made with, beside the activation."""
    density: float | None
    """Mean share of active neurons per token, as :func:`hf_sparse.tune` measured it; None if it did not."""

    def __init__(
        self, stock: nn.Module, roles: Roles, activation: nn.Module, *, relu_up: bool = False
    ) -> None:
        # Parameters, sizes, flags, hooks and whatever else the stock forward reads from self, and all that
        # nn.Module.__init__ would set. At once: one by one takes its time, and loading makes every block.
        vars(self).update({k: v for k, v in vars(stock).items() if k not in _NOT_SHARED})
        vars(self).update(
            _modules={**stock._modules, roles.act: activation},
            roles=roles,
            relu_up=relu_up,
            leaves={},
            topk=None,
            others=(),
            _stock=(stock,),  # in a tuple, so that it is not registered as a child
            # The function that was recognised: other tools replace that of the class.
            _stock_function=type(stock).forward,
            density=None,
            _forward_ran=False,
        )
        carry_hooks(stock, self)

    @property
    def stock(self) -> nn.Module:
        """The block that this one stands for, with the children that it had."""
        stock = self._stock[0]
        self.disclose()
        return stock

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
        return self.roles.activation(self._stock[0])

    @property
    def mix(self) -> float:
        """Share of the new activation; 1 outside of a finetune that mixes."""
        act = self.activation
        return act.k if isinstance(act, MixedActivation) else 1.0

    def set_mix(self, k: float) -> None:
        """Set the share of the new activation, 0 <= k <= 1."""
        self.set_activation(mixed(self.original_activation, self.activation, k))

    def set_activation(self, activation: nn.Module) -> None:
        """Put another activation in place; everything else stays."""
        self._modules[self.roles.act] = activation

    def in_stock(self, name: str, child: nn.Module) -> None:
        """Let the stock block have ``child`` under ``name``, as this one has."""
        self._stock[0]._modules[name] = child

    def restore(self) -> nn.Module:
        """The stock block with its own activation, and this block's other children as they are now.

        Raises:
            PatchError: a tool computes its parameters now (``torch.nn.utils.parametrize``).

        """
        if "parametrizations" in self._modules:
            raise PatchError(
                f"the parameters of a {self.stock_class.__name__} are parametrised "
                f"({', '.join(self._child('parametrizations')._modules)}); remove or merge that first."
            )
        self.disclose()
        (stock,) = self._stock
        for name, child in self._modules.items():
            ours = name in self.leaves or isinstance(child, ParameterLeaf)
            if name != self.roles.act and not ours:
                stock._modules[name] = child
        stock.training = self.training
        carry_hooks(self, stock)
        return stock

    def disclose(self) -> None:
        """Give the down projection its stock layout back."""
        weight = self._down_weight()
        if weight is not None:
            give_back(weight)

    def withholds(self) -> bool:
        """As of any module that is guarded."""
        return any_lent()

    def prepare(self, *, certify: bool) -> None:
        """Get ready to skip, and to certify if asked; else the first call that skips does so."""
        raise NotImplementedError

    @property
    def skips_int8(self) -> bool:
        """Whether the block skips with weights that are int8: at any density, up to 32 tokens, on a CPU."""
        return False

    @property
    def is_held(self) -> bool:
        """Whether only a holder of the down projection, or of its memory, keeps the block from skipping."""
        raise NotImplementedError

    def problems(self) -> tuple[list[Problem], str | None]:
        """What the block can run of the operators as it is, or why it can run none."""
        raise NotImplementedError

    def _down_weight(self) -> Tensor | None:
        """The weight of the down projection, if it has one that may be stored neuron by neuron."""
        raise NotImplementedError

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
            by = replaced_forward(self) or "one for modules that are split between processes"
            raise RuntimeError(
                f"this {self.stock_class.__name__} was patched, and then its forward was replaced by "
                f"{by} (Liger and kernel mappings do so), which does not compute what "
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

    def nothing_else(self) -> bool:
        """Whether no child but those with a role would do anything: whole-block operators call none."""
        for name, child in self._modules.items():
            if name in self.roles.names or name in self.leaves or child is None:
                continue
            drops = type(child) is nn.Dropout and child.training and child.p > 0
            inert = type(child) in (nn.Identity, nn.Dropout) and not drops
            if not inert or child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
                return False
        return True

    def _past_leaves(self, site: Literal["x", "y"], value: Tensor) -> Tensor:
        """What the leaves at ``site`` make of what passes there."""
        for name, where in self.leaves.items():
            if where == site:
                value = self._child(name)(value)
        return value

    def kernel(self) -> tuple[str, float] | None:
        """What the kernels call the activation; None if it must be called as a module."""
        act = self.activation
        hooked = (
            act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act) or hooks_on_all_modules()
        )
        return None if hooked else row_of(act, relu_up=self.relu_up)

    @property
    def selects(self) -> bool:
        """Whether it depends on the other neurons of a token which are silent; the operators cannot tell."""
        return self.topk is not None or type(self.activation) is StatisticalTopK

    @property
    def gives_zeros(self) -> bool:
        """Whether h is known to be exactly zero for silent neurons."""
        return self.selects or self.kernel() is not None

    def _selected(self, h: Tensor) -> Tensor:
        return h if self.topk is None else self.topk(h)

    def _rectified(self, u: Tensor) -> Tensor:
        """The factor of a gated block, with ReLU as far as ``relu_up`` is mixed in."""
        if not self.relu_up:
            return u
        k = self.mix
        return torch.relu(u) if k == 1 else (1 - k) * u + k * torch.relu(u)

    def _unguarded(self) -> nn.Module:
        """This block as an object of the stock class: the same attributes, nothing disclosed by their use."""
        # A parametrised module has another class, whose properties give its parameters.
        if torch.compiler.is_compiling() or "parametrizations" in self._modules:
            return self
        view = object.__new__(self.stock_class)
        object.__setattr__(view, "__dict__", self.__dict__)
        return view

    def _child(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])


def hooks_on_all_modules() -> bool:
    """Whether hooks are to be called with every module, as ``register_module_forward_hook`` asks."""
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def backward_hooks_on_all_modules() -> bool:
    """Whether hooks are to be called with the gradients of every module."""
    return bool(nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)
