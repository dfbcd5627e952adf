"""What a shape of MLP is: which part of a module plays which role, and what they compute together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from hf_sparse.adapters.pruning import Pruning, column_norms
from hf_sparse.errors import PatchError

Child: TypeAlias = Callable[[str], Callable[[Tensor], Tensor]]
"""Gives the child of a name, to be called."""
Linear: TypeAlias = tuple[Tensor, Tensor | None]
"""Weight and bias of a projection."""
Sizes: TypeAlias = Mapping[str, tuple[int, int]]
"""``(in, out)`` of linear layers by name."""
Site: TypeAlias = Literal["x", "p", "a", "h", "y"]
Watcher: TypeAlias = Callable[[Tensor, Tensor | None], None]
"""Gets what passes a site, and which token each of its rows is of; None where row i is token i."""

WRITTEN = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2")
"""Activations that are looked for in forwards."""


@dataclass(frozen=True, kw_only=True)
class Roles(ABC):
    """One MLP of one shape, by the names of its parts. Each shape is a subclass, in a file of its own."""

    down: str
    act: str
    """The activation: the name of a child, also where the forward of the class has it written in and there is
    no such child before the patch (see ``written``)."""
    written: str | None = None
    """What transformers calls an activation that is written into the forward of the class."""

    formula: ClassVar[str]
    """For people."""

    @property
    @abstractmethod
    def form(self) -> Literal["gated", "plain"]:
        """``gated``: ``down(act(gate(x)) * up(x))``; ``plain``: ``down(act(up(x)))``."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """All children that play a part."""

    def activation(self, module: nn.Module) -> nn.Module:
        """The activation of ``module``, a block of this shape."""
        own = module._modules.get(self.act)
        if own is None and self.written is not None:
            return cast(nn.Module, ACT2FN[self.written])
        return module.get_submodule(self.act) if own is None else own

    @abstractmethod
    def takes_relu_up(self, module: nn.Module) -> bool:
        """Whether ``module`` can put its up projection through ReLU as well."""

    @abstractmethod
    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """Hidden size and number of neurons of ``module``, a block of this shape."""

    @abstractmethod
    def weights(self, module: nn.Module) -> list[Linear]:
        """As :meth:`hf_sparse.adapters.Block.weights`."""

    @abstractmethod
    def watch(self, module: nn.Module, site: Site, fn: Watcher) -> RemovableHandle:
        """As :meth:`hf_sparse.adapters.Block.watch`."""


@dataclass(frozen=True, kw_only=True)
class LayerRoles(Roles):
    """A shape whose projections, and mostly the activation, are children that the block calls."""

    itself: bool = False
    """Whether a patched block computes the formula, and not the forward of its class: that has the activation
    written in, or needs more than the children. Then there are no other children."""

    @classmethod
    def candidates(cls, sizes: Sizes, act: str) -> Iterator[LayerRoles]:
        """The assignments that ``sizes`` allows, with a part for every linear layer."""
        for roles in cls.assignments(list(sizes), act):
            neurons, hidden = sizes[roles.down]
            if roles.linears(hidden, neurons) == sizes:
                yield roles

    @classmethod
    @abstractmethod
    def assignments(cls, names: Sequence[str], act: str) -> Iterator[LayerRoles]:
        """Every assignment of linear layers, by their ``names``, to parts; ``act`` is the activation."""

    @property
    @abstractmethod
    def before_down(self) -> tuple[str, ...]:
        """The linear layers before the down projection, as :meth:`split` takes them."""

    @abstractmethod
    def linears(self, hidden: int, neurons: int) -> dict[str, tuple[int, int]]:
        """``(in, out)`` of the linear layers in a block of these sizes."""

    @abstractmethod
    def project(self, child: Child, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pre-activation and, in a gated block, its factor: ``x [..., D]`` to ``[..., F]`` each."""

    def split(self, read: Sequence[Linear]) -> Sequence[Linear]:
        """Weights and biases of :attr:`before_down` as the operators' ``[F, D]``, the deciding one first."""
        return read

    @property
    def deciding(self) -> str | None:
        """The layer that is the deciding projection and nothing else; None if it is a part of one."""
        return self.before_down[0]

    @property
    def factor(self) -> str | None:
        """The layer that is the factor of a gated block and nothing else; None if there is no such one."""
        return None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.before_down, self.down, self.act)

    def hidden(self, child: Child, x: Tensor) -> Tensor:
        """What reaches the down projection, ``x [..., D] -> [..., F]``: the formula, literally."""
        p, u = self.project(child, x)
        a = child(self.act)(p)
        return a if u is None else a * u

    def takes_relu_up(self, module: nn.Module) -> bool:
        # Then the block computes itself: of other children it knows nothing.
        return self.form == "gated" and not module._modules.keys() - set(self.names)

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        size = linear_size(module.get_submodule(self.down))
        assert size is not None
        return size[1], size[0]

    def weights(self, module: nn.Module) -> list[Linear]:
        found = [read_linear(module.get_submodule(name)) for name in (*self.before_down, self.down)]
        return [*self.split(found[:-1]), found[-1]]

    def watch(self, module: nn.Module, site: Site, fn: Watcher) -> RemovableHandle:
        leaves = vars(module).get("leaves", {})  # of a patched block
        if site == "x" and (shifting := [name for name, at in leaves.items() if at == "x"]):
            return watch_child(module.get_submodule(shifting[-1]), fn, before=False)
        if site in ("x", "y"):
            watched = module
        elif site in ("p", "a") and self.act not in module._modules:
            raise ValueError(
                f"site={site!r} of a stock {type(module).__name__} cannot be watched: its forward has the "
                'activation written in. Patch the model first; with "original" it computes the same.'
            )
        else:
            watched = module.get_submodule(self.down if site == "h" else self.act)
        if site == "h":
            return watch_child(watched, lambda h, tokens: fn(used(watched, h), tokens), before=True)
        return watch_child(watched, fn, before=site in ("x", "p", "h"))


def input_pruning(linear: nn.Module) -> Pruning | None:
    """What a linear layer, perhaps under an adapter, leaves out of its input; see ``SparseLinear``."""
    found: Pruning | None = vars(_under_adapters(linear)).get("pruning")
    return found


def used(down: nn.Module, h: Tensor) -> Tensor:
    """``h`` as a down projection multiplies it: with 0 where it has no use for the weight."""
    pruning = input_pruning(down)
    if pruning is None:
        return h
    return pruning.deviations(h, readable_norms(down) if pruning.weighted else None)


def readable_norms(linear: nn.Module) -> Tensor:
    """:func:`column_norms` of a linear layer, perhaps under an adapter, outside of its forward.

    Raises:
        PatchError: its weight is not there now.

    """
    weight = cast(Tensor, _under_adapters(linear).weight)
    if weight.is_meta:
        raise PatchError(
            "the norms of the columns of a linear layer cannot be read: its weight is offloaded, or on the "
            "meta device. Load the model whole for this, or use thresholds that are not weighted."
        )
    return column_norms(weight)


def _under_adapters(linear: nn.Module) -> nn.Module:
    while (base := linear._modules.get("base_layer")) is not None:
        linear = base
    return linear


def watch_child(module: nn.Module, fn: Watcher, *, before: bool) -> RemovableHandle:
    """Call ``fn`` with the first input of ``module`` in each forward, or with its output."""
    if before:
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: fn(args[0] if args else next(iter(kwargs.values())), None),
            with_kwargs=True,
        )
    return module.register_forward_hook(lambda _, args, output: fn(output, None))


def read_linear(linear: Any) -> Linear:
    """Weight ``[out, in]`` and bias of a linear layer."""
    return linear.weight if hasattr(linear, "in_features") else linear.weight.t(), linear.bias


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` of anything that acts as a linear layer, None of anything else.

    Declared sizes and not the weight's shape: under ZeRO-3 a weight has shape (0,), and quantised or
    LoRA-wrapped layers keep the declaration.
    """
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    cls: Any = type(module)
    if not vars(module).keys() & _SIZES and not _may_have_sizes(cls):
        return None
    for fan_in, fan_out in (("in_features", "out_features"), ("nx", "nf")):
        size = getattr(module, fan_in, None), getattr(module, fan_out, None)
        if isinstance(size[0], int) and isinstance(size[1], int):
            return size[0], size[1]
    return None


_SIZES = {"in_features", "nx"}


@lru_cache(maxsize=512)
def _may_have_sizes(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls`` may have sizes without attributes of that name; to ask each takes long."""
    passes_on = cls.__getattr__ is not nn.Module.__getattr__  # such as a wrapper
    return passes_on or any(hasattr(cls, name) for name in _SIZES)


def shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape that a parameter has when nobody shards it: under ZeRO-3 ``shape`` is ``(0,)``."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
