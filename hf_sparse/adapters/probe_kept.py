"""Which children of a module are an MLP that it runs itself? Ask it, by what flows where.

The forward of the module's class runs on a stand-in of the same sizes whose linear layers, activation and
attention are stubs. In several runs some of them give something else, and what reaches the activation and the
down projection tells what these depend on:

- The activation is called once. Where it gives zero, and only there, so is the input of the down projection.
- That input is a function of what linear layers give, token by token. So the activation is no gate of an
  attention, whose other factor is another function; nor that of a mixer, which has one token in another.
- The projection that decides, and the factor of a gated MLP, are the layers that it changes with.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hf_sparse.adapters.copies import active
from hf_sparse.adapters.kept import Kept, own_roles
from hf_sparse.adapters.known import Known
from hf_sparse.adapters.probe import likeness, own_values
from hf_sparse.adapters.roles import Roles, linear_size, shape
from hf_sparse.adapters.shapes import recognise

_TOKENS = 3
LARGEST = 1 << 20
"""Elements of the parameters of a child that still runs: norms do, embeddings do not."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]
RETURNS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x,
    lambda x: (x, None),
    lambda x: (x, None, None),
    lambda x: (x,),
)
"""What modules that do not run may give back."""
STATES = ("residual", "hidden", "input", "state")


def recognise_kept(module: nn.Module, known: Known | None = None) -> Roles | None:
    """The roles of the parts of an MLP that ``module`` runs by its own forward; None if there is not one."""
    known = Known() if known is None else known
    candidates = list(_candidates(module, known))
    owners = {act.rpartition(".")[0] for act, _, _ in candidates} - {""}
    taken = {owner for owner in owners if _is_block(module, owner, known)}
    candidates = [one for one in candidates if one[0].rpartition(".")[0] not in taken]
    if not candidates:
        return None
    key = _likeness(module, {name for act, down, _ in candidates for name in (act, down)})
    if key not in known.roles:
        probed = (_Probe(module, *candidate).roles() for candidate in candidates)
        found = {roles for roles in probed if roles is not None}
        known.roles[key] = found.pop() if len(found) == 1 else None
    return known.roles[key]


def _is_block(module: nn.Module, name: str, known: Known) -> bool:
    """Whether the child ``name`` is an MLP by itself, whose activation is no other's."""
    child = active(cast(nn.Module, module._modules[name]))
    return own_roles(child) is not None or recognise(child, known) is not None


def _likeness(module: nn.Module, names: set[str], name: str = "") -> Any:
    """Equal for modules whose stand-ins are: all that the forward of a part that runs may look at."""
    module = active(module)
    parts: list[Any] = []
    if _runs(module, name, names):
        parts = [
            (k, None if v is None else _likeness(v, names, _join(name, k)))
            for k, v in module._modules.items()
        ]
    return *likeness(module), tuple(parts)


def _runs(module: nn.Module, name: str, names: Iterable[str]) -> bool:
    """Whether ``module`` runs in a probe of what is called ``names``, and is not a stub."""
    if not name or isinstance(module, _CONTAINERS) or not module._modules:
        return True
    return any(one.startswith(f"{name}.") for one in names)


def _candidates(module: nn.Module, known: Known) -> Iterator[tuple[str, str, int]]:
    """Names of an activation and a down projection that ``module`` and no module in it has both of."""
    own = known.children(module)
    inner = {"": own, **{name: known.children(active(child)) for name, child in own.parents.items()}}
    for prefix, one in inner.items():
        sizes = set(one.linears.values())
        for act, (other, theirs) in product(one.activations, inner.items()):
            for down, (neurons, hidden) in theirs.linears.items():
                apart = not prefix or prefix != other
                if apart and sizes & {(hidden, neurons), (hidden, 2 * neurons)}:
                    yield _join(prefix, act), _join(other, down), neurons


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@dataclass
class _Run:
    """What the stubs give in one run, and what they have seen."""

    replayed: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of linear layers, whatever they get."""
    scale: float = 1.0
    """Of the input of the module, and of what is given by modules that do not run."""
    out: dict[str, Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    p: Tensor | None = None
    zeros: Tensor | None = None
    h: Tensor | None = None
    read: bool = False
    """Whether the forward looked at the weight of the down projection."""


def _indices(module: nn.Module) -> list[int]:
    """Numbers that ``module`` may know a layer by, where several share it (Zamba2)."""
    known = [key for value in vars(module).values() if isinstance(value, dict) for key in value]
    return [key for key in known if type(key) is int][:4] or [0]


class _Probe:
    def __init__(self, module: nn.Module, act: str, down: str, neurons: int) -> None:
        self.module, self.act, self.down, self.neurons = module, act, down, neurons
        self.run = _Run()
        self.returns = RETURNS[0]
        self.forward: Callable[..., Any] = _nothing
        self.index = 0
        self.states: list[str] = []
        self.others: dict[str, int | None] = {}
        """Further arguments of the forward: names of those that are like its input, and the others."""
        self.sizes: dict[str, tuple[int, int]] = {}
        """Of all linear layers that may run."""

    def roles(self) -> Kept | None:
        for returns, index in product(RETURNS, _indices(self.module)):
            self.returns, self.index = returns, index
            try:
                with torch.no_grad(), torch.device("cpu"):
                    self._set_up()
                    return self._flow()
            except Exception:  # an attention that gives something else, or a forward that needs more
                continue
            finally:
                self.forward = _nothing  # a cycle, which would hold what the stand-in has of the model
        return None

    def _set_up(self) -> None:
        forward = type(self.module).forward
        self.forward = partial(forward, self._stand_in(self.module, ""))
        hidden = self.sizes[self.down][1]
        self.x = torch.linspace(-1, 1, _TOKENS * hidden, dtype=torch.float64).reshape(1, _TOKENS, -1)
        self.states, self.others = [], {}
        for one in list(inspect.signature(forward).parameters.values())[2:]:
            if one.kind is not one.POSITIONAL_OR_KEYWORD:
                continue
            if "idx" in one.name:
                self.others[one.name] = self.index
            elif one.default is one.empty and any(state in one.name for state in STATES):
                self.states.append(one.name)
            elif one.default is one.empty:
                self.others[one.name] = None

    def _flow(self) -> Kept | None:
        base = self._of()
        before = base.calls[: base.calls.index(self.down)]
        if base.read or base.calls.count(self.down) != 1 or base.calls.count(self.act) != 1:
            return None
        p, h, zeros = base.p, base.h, base.zeros
        if p is None or h is None or zeros is None or h.shape != p.shape or h.shape[-1] != self.neurons:
            return None
        linears = [name for name in before if name != self.act]
        if not torch.equal(h == 0, zeros) or len(set(linears)) != len(linears):
            return None
        given = {name: base.out[name] for name in linears}
        if not _same(self._of(given, scale=0.7), base):
            return None
        deciding, factors = [], []
        for name in linears:
            changed = self._of({**given, name: _bumped(given[name])})
            if not _equal(changed.p, p):
                deciding.append(name)
            elif not _equal(changed.h, h):
                factors.append(name)
        only_first = self._of({name: _bumped(out, rows=1) for name, out in given.items()})
        if not (_equal(only_first.p, p, after=1) and _equal(only_first.h, h, after=1)):
            return None
        # A scan that runs backwards has later tokens in earlier ones.
        flipped = {name: _bumped(out.flip(-2), rows=1).flip(-2) for name, out in given.items()}
        only_last = self._of(flipped)
        if not (_equal(only_last.p, p, before=-1) and _equal(only_last.h, h, before=-1)):
            return None
        return self._named(deciding, factors, base)

    def _named(self, deciding: list[str], factors: list[str], base: _Run) -> Kept | None:
        first, up = self._outermost(deciding), self._outermost(factors)
        hidden = self.sizes[self.down][1]
        if first is None or (factors and up is None):
            return None
        halves: Literal["gate first", "up first"] | None = None
        if self.sizes[first] == (hidden, 2 * self.neurons):
            if up is not None:
                return None
            decides = [self._half_decides(first, base, half) for half in (0, 1)]
            if decides not in ([True, False], [False, True]):
                return None
            halves = "gate first" if decides[0] else "up first"
        names = (first,) if up is None else (first, up)
        width = 2 * self.neurons if halves else self.neurons
        if any(self.sizes[name] != (hidden, width) for name in names):
            return None
        return Kept(first=names, halves=halves, act=self.act, down=self.down)

    def _half_decides(self, name: str, base: _Run, half: int) -> bool:
        out = base.out[name]
        mask = (_range(out.shape[-1]) < out.shape[-1] // 2) == (half == 0)
        given = {one: base.out[one] for one in base.out if one != self.down}
        changed = self._of({**given, name: torch.where(mask, _bumped(out), out)})
        return not _equal(changed.p, base.p)

    def _outermost(self, names: list[str]) -> str | None:
        """The one that is no part of something else, as an adapter; None if there is not one."""
        depths = [name.count(".") for name in names]
        if not names or depths.count(min(depths)) != 1:
            return None
        return names[depths.index(min(depths))]

    def _of(self, replayed: dict[str, Tensor] | None = None, *, scale: float = 1.0) -> _Run:
        self.run = _Run(replayed or {}, scale)
        x = self.x * scale
        self.forward(x, **dict.fromkeys(self.states, x), **self.others)
        return self.run

    def _stand_in(self, module: nn.Module, name: str) -> Any:
        module = active(module)
        if name == self.act:
            return self._activate
        if (size := linear_size(module)) is not None:
            self.sizes[name] = size
            return _Linear(self, name, size)
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if not _runs(module, name, (self.act, self.down)) or sum(numel(t) for t in tensors) > LARGEST:
            return _Opaque(self, module)
        replaced = ("forward", "_old_forward", "_hf_hook")
        own = {k: v for k, v in own_values(module).items() if k not in replaced}
        own.update((hooks, {}) for hooks in HOOKS)
        own["training"] = False
        if "chunk_size_feed_forward" in own:  # some tokens after the other: the same, but not of three tokens
            own["chunk_size_feed_forward"] = 0
        own["_parameters"] = {k: made_up(v) for k, v in module._parameters.items()}
        own["_buffers"] = {k: made_up(v) for k, v in module._buffers.items()}
        own["_modules"] = {
            k: None if v is None else self._stand_in(v, _join(name, k)) for k, v in module._modules.items()
        }
        stand_in = object.__new__(type(module))
        object.__setattr__(stand_in, "__dict__", own)
        return stand_in

    def _activate(self, p: Tensor) -> Tensor:
        run = self.run
        run.calls.append(self.act)
        run.p = p.flatten(0, -2).clone()
        places = _range(run.p.numel()).reshape(run.p.shape)
        run.zeros = (places.long() * 5 // 3) % 4 == 0
        return torch.where(run.zeros.reshape(p.shape), 0.0, 0.3 + p.sigmoid())


class _Linear:
    """Each output is one input, scaled and moved."""

    def __init__(self, probe: _Probe, name: str, size: tuple[int, int]) -> None:
        self._probe, self._name = probe, name
        self.in_features, self.out_features = size
        place = _range(self.out_features)
        self._source = (place * 7 + len(name)).long() % self.in_features
        self._scale, self._move = 0.5 + place % 17 / 17, place % 11 / 11 - 0.4

    @property
    def weight(self) -> Tensor:
        self._probe.run.read |= self._name == self._probe.down
        return self._move[:1].expand(self.out_features, self.in_features)

    @property
    def bias(self) -> Tensor:
        return self._move

    def __call__(self, x: Tensor) -> Tensor:
        run, name = self._probe.run, self._name
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{name} takes {self.in_features} features, and gets {x.shape[-1]}")
        run.calls.append(name)
        if name == self._probe.down:
            run.h = x.flatten(0, -2).clone()
        if name not in run.replayed:
            run.out[name] = x[..., self._source] * self._scale + self._move
        else:
            run.out[name] = run.replayed[name].reshape(*x.shape[:-1], -1)
        return run.out[name].clone()


class _Opaque:
    """A module that does not run, as attention: it gives back what it gets."""

    def __init__(self, probe: _Probe, module: nn.Module) -> None:
        self._probe = probe
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        vars(self).update({k: v for k, v in plain.items() if not k.startswith("_")})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return self._probe.returns(x * self._probe.run.scale)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _bumped(out: Tensor, rows: int | None = None) -> Tensor:
    change = (_range(out.shape[-1]) + 1).cos() / 2
    moved = out.flatten(0, -2).clone()
    moved[:rows] += change
    return moved.reshape(out.shape)


def _same(one: _Run, other: _Run) -> bool:
    return _equal(one.p, other.p) and _equal(one.h, other.h)


def _equal(
    one: Tensor | None, other: Tensor | None, after: int | None = None, before: int | None = None
) -> bool:
    return one is not None and other is not None and torch.equal(one[after:before], other[after:before])


def _range(count: int) -> Tensor:
    # Whatever the default dtype and device are while a model is built, ZeRO-3's among them.
    return torch.arange(count, device="cpu").to("cpu", torch.float64)


def numel(tensor: Tensor) -> int:
    """Elements of a parameter, sharded or not."""
    return math.prod(shape(tensor))


def made_up(tensor: Tensor | None) -> Any:
    """Values of no model, for the tensors of what runs may be on the meta device, or sharded."""
    if tensor is None:
        return None
    if not tensor.is_floating_point():
        return torch.zeros(shape(tensor), dtype=tensor.dtype, device="cpu")
    return torch.linspace(0.6, 1.4, numel(tensor), dtype=torch.float64).reshape(shape(tensor))
