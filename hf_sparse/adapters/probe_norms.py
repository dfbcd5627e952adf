"""Which norms of a layer feed its projections? Ask the layer, by what flows where.

The forward of a module's class runs on a stand-in of the same sizes. Its norms give made-up tensors, its
other children constants, whatever they get. In another run one norm gives something else: if that very tensor
reaches children with projections in them, and nothing else changes, then the norm feeds them and nothing
else. A norm whose output is added to the residual, as after an MLP, changes what the module gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse.adapters.block import Block
from hf_sparse.adapters.copies import active, in_use
from hf_sparse.adapters.kept import Kept
from hf_sparse.adapters.probe import own_values
from hf_sparse.adapters.probe_kept import HOOKS, LARGEST, RETURNS, STATES, made_up, numel
from hf_sparse.adapters.roles import linear_size, shape

_TOKENS = 3
_TRIALS = 256
"""Ways in which the children of a module may give back what they do, that are tried."""


class Feed(NamedTuple):
    """A norm that feeds projections and nothing else."""

    owner: nn.Module
    name: str
    """Of the norm in ``owner``."""
    children: tuple[str, ...]
    """Qualified names of the children of ``owner`` that it feeds."""


class UnclearError(Exception):
    """It cannot be told which norms feed the projections of a layer; says why."""


def feeding_norms(layer: nn.Module, blocks: Sequence[Block], name: str) -> list[Feed]:
    """The norms in ``layer`` that feed projections and nothing else.

    Those inside of an attention, beside its projections (as of queries and keys), and in front of the down
    projection of an MLP are none.

    Args:
        layer: a layer of a model.
        blocks: its MLP blocks, by their names in the model.
        name: of ``layer`` in the model.

    Raises:
        UnclearError: that cannot be told, or a child of ``layer`` is fed by something else.

    """
    hidden = blocks[0].hidden_size
    inside = tuple(f"{block.name}." for block in blocks if not block.stays)
    downs = {f"{block.name}.{block.roles.down}" for block in blocks}
    found: list[Feed] = []
    fed, unfed = set(downs), set()
    for place, module in in_use(layer, name):
        if f"{place}.".startswith(inside) or active(module) is not module:
            continue
        norms = [k for k, v in module._modules.items() if v is not None and is_norm(active(v), hidden)]
        around = any(f"{block.name}.".startswith(f"{place}.") for block in blocks)
        beside = any(linear_size(v) is not None for v in module._modules.values() if v is not None)
        if not norms or (beside and not around):
            continue
        probe = _Probe(module, norms, hidden)
        feeds = probe.fed()
        if feeds is None:
            raise UnclearError(f"the forward of {place} ({type(module).__name__}) cannot be followed")
        for norm, children in feeds.items():
            names = tuple(f"{place}.{child}" for child in children)
            if not downs.intersection(names):
                found.append(Feed(module, norm, names))
                fed.update(names)
        if module is layer:
            unfed = {f"{place}.{k}" for k in probe.others if _has_linears(module._modules[k])}
    for child in sorted(unfed):
        if not any(_in(one, child) for one in fed):
            raise UnclearError(f"{child} gets its input from no norm of its layer alone")
    for block in blocks:
        first = [f".{one}" for one in block.roles.first] if isinstance(block.roles, Kept) else [""]
        if not all(any(_in(f"{block.name}{one}", other) for other in fed - downs) for one in first):
            raise UnclearError(f"the MLP {block.name} gets its input from no norm of its layer alone")
    return found


def _in(name: str, other: str) -> bool:
    """Whether the module of the name ``name`` is, or is in, that of the name ``other``."""
    return f"{name}.".startswith(f"{other}.")


def is_norm(module: nn.Module, hidden: int) -> bool:
    """Whether ``module`` normalises vectors: what it gives does not change with their scale.

    Of the size of its parameters, or of the ``hidden`` one if it has none.
    """
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if any(child is not None for child in module._modules.values()) or linear_size(module) is not None:
        return False
    size = max((shape(tensor)[0] for tensor in tensors if len(shape(tensor)) == 1), default=hidden)
    if any(shape(tensor) not in ((size,), (1,), ()) for tensor in tensors):
        return False
    x = torch.linspace(-70, 90, 2 * size, dtype=torch.float64, device="cpu").sin() * 100
    x = (x + torch.arange(2 * size, device="cpu") % 7).reshape(1, 2, size)
    try:
        with torch.no_grad(), torch.device("cpu"):
            y, scaled = (type(module).forward(_alike(module, {}), one) for one in (x, 8 * x))
    except Exception:  # it needs more than a tensor
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or torch.allclose(y[:, 0], y[:, 1]):
        return False
    return torch.allclose(y, scaled, rtol=1e-3, atol=1e-3)


@dataclass
class _Run:
    """What the stubs have seen in one run, by name and in order, and what the module gave."""

    seen: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    given: dict[str, Tensor] = field(default_factory=dict)
    """What norms gave."""


class _Probe:
    def __init__(self, module: nn.Module, norms: Sequence[str], hidden: int) -> None:
        self.module, self.norms, self.hidden = module, norms, hidden
        children = {k: active(v) for k, v in module._modules.items() if v is not None}
        self.others = [k for k, v in children.items() if k not in norms and _projects(v)]
        self.rest = [k for k in children if k not in (*norms, *self.others)]
        self.kept = {k: v for k, v in children.items() if isinstance(v, nn.ModuleList | nn.ModuleDict)}
        self.run = _Run()
        self.ways: dict[str, Any] = {}
        """By name, how a child gives back what it does."""
        self.encoder = False
        """Whether the forward is given states of an encoder."""

    def fed(self) -> dict[str, tuple[str, ...]] | None:
        """By norm, the children that it feeds, of those that feed nothing else; None if that is unclear."""
        if sum(map(numel, (p for p in self.module._parameters.values() if p is not None))) > LARGEST:
            return None
        if any(is_norm(one, self.hidden) for name in self.rest for _, one in in_use(self._child(name))):
            return None  # a norm in some wrapping: which children it feeds cannot be seen
        opaque = [name for name in self.others if linear_size(active(self._child(name))) is None]
        returns = islice(product(RETURNS, repeat=len(opaque)), _TRIALS)
        for self.encoder, ways in product((False, True), returns):
            try:
                with torch.no_grad(), torch.device("cpu"):
                    self.ways = dict(zip(opaque, ways, strict=True))
                    base = self._of(None)
                    found = {norm: self._feeds(norm, base, self._of(norm)) for norm in self.norms}
                    return {norm: feeds for norm, feeds in found.items() if feeds}
            except Exception:  # a child that gives something else, a forward that needs more, an idle norm
                continue
        return None

    def _feeds(self, norm: str, base: _Run, changed: _Run) -> tuple[str, ...]:
        if [name for name, _ in base.seen] != [name for name, _ in changed.seen]:
            return ()
        if not _equal(base.out, changed.out):
            return ()
        given, feeds = changed.given[norm].flatten(), []
        for (name, before), (_, after) in zip(base.seen, changed.seen, strict=True):
            moved = [b for a, b in zip(before, after, strict=True) if not _equal([a], [b])]
            if moved and name in self.norms:
                return ()
            if any(not torch.equal(one.flatten(), given) for one in moved):
                return ()
            feeds += [name] if moved else []
        return tuple(dict.fromkeys(feeds))

    def _of(self, changed: str | None) -> _Run:
        self.run = run = _Run()
        forward = type(self.module).forward
        x = _noise(_TOKENS * self.hidden, 0).reshape(1, _TOKENS, -1)
        given: dict[str, Any] = {}
        for one in list(inspect.signature(forward).parameters.values())[2:]:
            if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty:
                given[one.name] = x if any(state in one.name for state in STATES) else None
            elif self.encoder and one.name == "encoder_hidden_states":  # without them the norm may be idle
                given[one.name] = x
        children: dict[str, Any] = {}
        for name, child in self.module._modules.items():
            if child is None or name in self.kept:
                children[name] = child
            elif name in self.norms:
                children[name] = self._normalise(name, 1 + self.norms.index(name) + 50 * (name == changed))
            elif name in self.others:
                size = linear_size(active(child))
                out = _noise(_TOKENS * (size[1] if size else self.hidden), 100 + len(children))
                children[name] = self._stub(name, out)
            else:
                children[name] = _first
        run.out = _tensors(forward(_alike(self.module, children), x, **given))
        return run

    def _normalise(self, name: str, seed: int) -> Any:
        def stub(x: Tensor, *_: Any, **__: Any) -> Tensor:
            self.run.seen.append((name, [x.clone()]))
            self.run.given[name] = made = _noise(x.numel(), seed).reshape(x.shape)
            return made.clone()

        # Some forwards look at the dtype of the weight.
        vars(stub).update(_alike(active(self._child(name)), {})._parameters)
        return stub

    def _stub(self, name: str, out: Tensor) -> Any:
        way = self.ways.get(name)

        def stub(*args: Any, **kwargs: Any) -> Any:
            seen = _tensors((args, kwargs))
            self.run.seen.append((name, [one.clone() for one in seen]))
            made = out.reshape(*seen[0].shape[:-1], -1).clone()
            return made if way is None else way(made)

        return stub

    def _child(self, name: str) -> nn.Module:
        child = self.module._modules[name]
        assert child is not None
        return child


def _projects(module: nn.Module) -> bool:
    """Whether there are weights of projections in ``module``."""
    weights = (p for _, one in in_use(module) for p in one._parameters.values() if p is not None)
    return _has_linears(module) or any(len(shape(weight)) > 1 for weight in weights)


def _has_linears(module: nn.Module | None) -> bool:
    return module is not None and any(linear_size(one) is not None for _, one in in_use(module))


def _alike(module: nn.Module, children: dict[str, Any]) -> Any:
    """``module`` with made-up parameters and other ``children``, for its forward to run on."""
    own = {k: v for k, v in own_values(module).items() if k not in ("forward", "_old_forward", "_hf_hook")}
    own.update((hooks, {}) for hooks in HOOKS)
    own["training"] = False
    own["_parameters"] = {k: made_up(v) for k, v in module._parameters.items()}
    own["_buffers"] = {k: made_up(v) for k, v in module._buffers.items()}
    own["_modules"] = children
    alike = object.__new__(type(module))
    object.__setattr__(alike, "__dict__", own)
    return alike


def _first(*args: Any, **kwargs: Any) -> Any:
    """A dropout in eval mode, or an identity."""
    return next(iter((*args, *kwargs.values())))


def _tensors(value: Any) -> list[Tensor]:
    return list(_walk(value))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _walk(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _walk(one)


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _noise(count: int, seed: int) -> Tensor:
    places = torch.arange(count, device="cpu").to("cpu", torch.float64)
    return (places * (1.3 + 0.1 * seed) + seed).sin()
