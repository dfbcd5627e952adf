"""A patched MLP whose module stays: what is asked of it, and how it comes and goes.

The module gets a mark, :class:`~hf_sparse.adapters.kept.KeptState`, another activation and, where that is a
plain linear layer, a :class:`SparseLinear` for its down projection. The mark, and not that layer, says that
it is patched: the layer may be quantised, wrapped or exchanged later, and is right in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from hf_sparse.activations import gives_zeros
from hf_sparse.activations.mixed import mixed
from hf_sparse.adapters import Block
from hf_sparse.adapters.copies import copies
from hf_sparse.adapters.kept import MARK, Kept, KeptState, owners
from hf_sparse.errors import PatchError
from hf_sparse.modules.decoding_linear import is_linear
from hf_sparse.modules.sparse_block import SparseBlock
from hf_sparse.modules.sparse_linear import SparseLinear
from triton_ops import Problem


class KeptBlock:
    """The patched MLP of ``module``, which stays. Not a module, and nothing is kept in it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._state: KeptState = vars(module)[MARK]
        self._roles = self._state.roles

    @property
    def activation(self) -> nn.Module:
        """The activation in place."""
        return self._module.get_submodule(self._roles.act)

    @property
    def others(self) -> tuple[str, ...]:
        """As :attr:`SparseBlock.others`."""
        return self._state.others

    @property
    def density(self) -> float | None:
        """As :attr:`SparseBlock.density`."""
        return self._state.density

    @density.setter
    def density(self, density: float | None) -> None:
        self._state.density = density
        for linear in self._linears():
            linear.density = density

    def set_mix(self, k: float) -> None:
        """Set the share of the new activation, 0 <= k <= 1."""
        self.set_activation(mixed(self._state.original, self.activation, k))

    def set_activation(self, activation: nn.Module) -> None:
        """As :meth:`SparseBlock.set_activation`."""
        _put(self._module, self._roles, activation)
        for linear in self._linears():
            linear.gives_zeros = gives_zeros(activation)

    def prepare(self, *, certify: bool) -> None:
        """Store the down projection neuron-major. There is nothing to certify in it."""
        for linear in self._linears():
            linear.prepare()

    @property
    def is_held(self) -> bool:
        """As :attr:`SparseBlock.is_held`."""
        return any(linear.is_held for linear in self._linears())

    def problems(self) -> tuple[list[Problem], str | None]:
        """As :meth:`SparseBlock.problems`."""
        linears = list(self._linears())
        return linears[0].problems() if linears else ([], "its down projection is no plain linear layer")

    @property
    def skips_int8(self) -> bool:
        """As :attr:`SparseBlock.skips_int8`."""
        return any(linear.skips_int8 for linear in self._linears())

    def _linears(self) -> Iterator[SparseLinear]:
        for owner, name in down_places(self._module, self._roles):
            if isinstance(one := owner._modules[name], SparseLinear):
                yield one


@dataclass(eq=False)
class KeptChange:
    """What is to be put into a module that stays. Made before anything is changed."""

    module: nn.Module
    roles: Kept
    activation: nn.Module
    downs: list[tuple[nn.Module, str, nn.Module]]
    """Owner, name there, and what comes there."""
    state: KeptState | None
    """None for the stock module."""

    @classmethod
    def to_stock(cls, block: Block) -> KeptChange:
        """Back to what the module was; without a patch, what it is."""
        roles = block.roles
        assert isinstance(roles, Kept)
        downs: list[tuple[nn.Module, str, nn.Module]] = [
            (owner, name, one.restore())
            for owner, name in down_places(block.module, roles)
            if isinstance(one := owner._modules[name], SparseLinear)
        ]
        return cls(block.module, roles, block.original_activation, downs, None)

    @classmethod
    def to_sparse(
        cls, block: Block, activation: nn.Module, mix: float, others: tuple[str, ...] = ()
    ) -> KeptChange:
        """To ``activation``, mixed in at ``mix``; ``others`` as of :class:`KeptState`."""
        stock = cls.to_stock(block)
        activation = mixed(stock.activation, activation, mix)
        restored = {(id(owner), name): one for owner, name, one in stock.downs}
        downs = list(stock.downs)
        for owner, name in down_places(block.module, stock.roles):
            linear = restored.get((id(owner), name), owner._modules[name])
            if is_linear(linear) and ("forward" not in vars(linear) or hasattr(linear, "_hf_hook")):
                downs.append((owner, name, SparseLinear(linear, gives_zeros=gives_zeros(activation))))
        state = KeptState(stock.roles, stock.activation, type(block.module).forward, others)
        return cls(block.module, stock.roles, activation, downs, state)

    def make(self) -> None:
        """Put it there: assignments only."""
        _put(self.module, self.roles, self.activation)
        for owner, name, one in self.downs:
            owner._modules[name] = one
        vars(self.module).pop(MARK, None)
        if self.state is not None:
            vars(self.module)[MARK] = self.state


def sparse_part(module: nn.Module) -> SparseBlock | KeptBlock | None:
    """What a patched block is asked by, where it stands or is marked; None if ``module`` is none."""
    if isinstance(module, SparseBlock):
        return module
    return KeptBlock(module) if MARK in vars(module) else None


def sparse_parts(model: nn.Module) -> list[SparseBlock | KeptBlock]:
    """The same of all patched blocks in ``model``."""
    return [part for module in model.modules() if (part := sparse_part(module)) is not None]


@contextmanager
def stock_downs(model: nn.Module) -> Iterator[None]:
    """While in here, down projections of modules that stay are stock layers, for tools that look for these.

    Those that are the same afterwards are sparse again; what took the place of one stays.
    """
    taken: list[tuple[nn.Module, str, SparseLinear, nn.Linear]] = []
    for module in model.modules():
        if isinstance(module, SparseLinear) and module.pruning is not None:
            raise PatchError(
                "linear layers with thresholds on their inputs (inputs) cannot be quantised while loading; "
                "load the model without, quantise it and calibrate it then."
            )
        if MARK in vars(module):
            for owner, name in down_places(module, vars(module)[MARK].roles):
                if type(one := owner._modules[name]) is SparseLinear:
                    owner._modules[name] = stock = one.restore()
                    taken.append((owner, name, one, stock))
    try:
        yield
    finally:
        for owner, name, one, stock in taken:
            if owner._modules.get(name) is stock:
                owner._modules[name] = sparse = SparseLinear(stock, gives_zeros=one.gives_zeros)
                sparse.density = one.density


def down_places(module: nn.Module, roles: Kept) -> Iterator[tuple[nn.Module, str]]:
    """Where the down projection is: in ``module``, in PEFT's copies of its parts, under LoRA."""
    for owner, name in owners(module, roles.down):
        for place in copies(owner, name):
            yield _under_adapters(*place)


def _under_adapters(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    child = owner._modules[name]
    if child is not None and child._modules.get("base_layer") is not None:
        return _under_adapters(child, "base_layer")
    return owner, name


def _put(module: nn.Module, roles: Kept, activation: nn.Module) -> None:
    for owner, name in owners(module, roles.act):
        owner._modules[name] = activation
