"""A mixture of experts, their weights stacked in parameters of three dimensions: Mixtral, Qwen-MoE, DeepSeek.

Each token goes to a few experts, each of which is an MLP: gated, ``down(act(gate(x)) * up(x))``, or plain,
``down(act(up(x)))``. Their weighted outputs are added up. The router is a module of its own and not part of
this one, which is given its choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters.roles import WRITTEN, Linear, Roles, Site, Watcher, shape
from triton_ops.routed import by_expert


class Routed(NamedTuple):
    """What experts are called with."""

    x: Tensor
    """``[T, D]``."""
    experts: Tensor
    """int64 ``[T, k]``: the experts of each token. One out of their range is none, or an identity."""
    weights: Tensor
    """``[T, k]``: what their outputs are multiplied by."""

    def by_expert(self, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every expert below ``count`` that is hit: number, tokens ``[n]`` and their weights ``[n, 1]``."""
        for expert, places in by_expert(self.experts, count):
            yield expert, places // self.experts.shape[-1], self.weights.flatten()[places].unsqueeze(-1)


class Inside(NamedTuple):
    """What one expert computes on its way: pre-activation, activation and h, each ``[n, F]``."""

    p: Tensor
    a: Tensor
    h: Tensor


@dataclass(frozen=True, kw_only=True)
class Experts(Roles):
    """Two parameters of three dimensions, first and down, perhaps with biases ``*_bias``."""

    first: str
    """``[E, 2F, D]``, gate and then up, of gated experts; ``[E, F, D]`` of plain ones. See ``transposed``."""
    gated: bool
    transposed: bool = False
    """Whether the last two dimensions are the other way round, in both parameters."""
    interleaved: bool = False
    """Whether rows of gate and up take turns."""
    limit: str | None = None
    """An attribute that limits what the gate is, and what the factor is on both sides, as in GPT-OSS."""
    plus: float = 0.0
    """What is added to the factor."""
    own_gate: bool = False
    """Whether the class has another way from the first projection to h (``_apply_gate``), which calls the
    activation and is silent where that is."""
    norm: str | None = None
    """A child that normalises the output of an expert before it is weighted."""
    identity: bool = False
    """Whether experts beyond those that have weights give a token back as it is; else they are none."""

    formula = "stacked experts, each down(act(gate(x)) * up(x)) or down(act(up(x)))"

    @property
    def form(self) -> Literal["gated", "plain"]:
        return "gated" if self.gated else "plain"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.act,) if self.norm is None else (self.act, self.norm)

    def count(self, module: nn.Module) -> int:
        """How many experts of ``module`` have weights."""
        return self._shape(module)[0]

    def takes_relu_up(self, module: nn.Module) -> bool:
        return self.gated and not self.own_gate and not self.plus

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        _, *sizes = self._shape(module)
        return (sizes[1], sizes[0]) if self.transposed else (sizes[0], sizes[1])

    def _shape(self, module: nn.Module) -> tuple[int, ...]:
        """Of the down projections; as the patch found it while FSDP1 has them flattened."""
        now = shape(getattr(module, self.down))
        return now if len(now) == 3 else getattr(module, "down_shape", now)

    @property
    def is_plain_formula(self) -> bool:
        """Whether an expert is just what the operators compute."""
        others = self.interleaved, self.limit, self.plus, self.own_gate, self.norm, self.identity
        return not (self.transposed or any(others))

    def weights(self, module: nn.Module) -> list[Linear]:
        first, down = self.read(module._parameters, self.first), self.read(module._parameters, self.down)
        if not self.gated:
            return [first, down]
        gate, up = self._halves(first[0])
        biases: tuple[Tensor | None, ...] = (None, None)
        if first[1] is not None:
            biases = tuple(half.squeeze(-1) for half in self._halves(first[1].unsqueeze(-1)))
        return [(gate, biases[0]), (up, biases[1]), down]

    def _halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, along the last dimension but one."""
        if self.interleaved:
            return both[..., ::2, :], both[..., 1::2, :]
        first, second = both.chunk(2, dim=-2)
        return first, second

    def read(self, parameters: Any, name: str) -> Linear:
        """Weight ``[E, out, in]`` and bias ``[E, out]`` of a projection."""
        weight = parameters[name]
        return weight.transpose(-1, -2) if self.transposed else weight, parameters.get(f"{name}_bias")

    def inside(
        self,
        module: nn.Module,
        x: Tensor,
        expert: int,
        rectified: Callable[[Tensor], Tensor] = lambda u: u,
    ) -> Inside:
        """What ``expert`` makes of ``x [n, D]``, by the calls that the class makes."""
        act: Any = self.activation(module)
        both = project(module, self.first, x, expert, transposed=self.transposed)
        if self.own_gate:
            seen: list[Tensor] = []
            handle = act.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
            try:
                h = module._apply_gate(both)  # type: ignore[operator]
            finally:
                handle.remove()
            return Inside(seen[0], seen[1], h)
        if not self.gated:
            a = act(both)
            return Inside(both, a, a)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, dim=-1)
        if self.limit is not None:
            limit = getattr(module, self.limit)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        a, u = act(gate), rectified(up)
        return Inside(gate, a, a * (u + self.plus if self.plus else u))

    def watch(self, module: nn.Module, site: Site, fn: Watcher) -> RemovableHandle:
        own = getattr(module, "watch", None)
        if site == "y":
            return module.register_forward_hook(lambda _, args, output: fn(output, None))
        if own is not None and site != "x":
            return own(site, fn)

        def watched(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = routing(getattr(module, "stock_class", type(module)).forward, args, kwargs)
            if site == "x":
                fn(call.x, None)
                return
            # The class is free to compute all experts in one go: what is inside is computed once more.
            values = [
                (getattr(self.inside(module, call.x[tokens], expert), site), tokens)
                for expert, tokens, _ in call.by_expert(self.count(module))
            ]
            if values:
                fn(*map(torch.cat, zip(*values, strict=True)))

        return module.register_forward_pre_hook(watched, with_kwargs=True)


_LIMITS = ("limit", "swiglu_limit")


def project(module: nn.Module, name: str, x: Tensor, expert: int, *, transposed: bool) -> Tensor:
    """``x [n, in]`` by the projection ``name`` of an expert: ``[n, out]``."""
    weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    if not transposed:
        return F.linear(x, weight, None if bias is None else bias[expert])
    return x @ weight if bias is None else x @ weight + bias[expert]


def routing(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed:
    """The arguments of a call of experts, in whatever way they are given."""
    if len(args) == 3 and not kwargs:
        return Routed(*args)
    bound = _signature(inspect.unwrap(forward)).bind(None, *args, **kwargs)
    return Routed(*list(bound.arguments.values())[1:4])


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def candidates(module: nn.Module, act: str) -> Iterator[Experts]:
    """What a module with stacked parameters can be by their shapes."""
    shapes = {name: shape(p) for name, p in module._parameters.items() if p is not None}
    stacked = [name for name, size in shapes.items() if len(size) == 3]
    others = [name for name in shapes if name not in stacked]
    norms = [None, *(name for name in module._modules if name != act)]
    if len(stacked) != 2 or any(name.removesuffix("_bias") not in stacked for name in others):
        return
    for (first, down), transposed in product(permutations(stacked), (False, True)):
        (experts, *wide), (kept, *narrow) = shapes[first], shapes[down]
        if transposed:
            wide, narrow = wide[::-1], narrow[::-1]
        if kept > experts or wide[1] != narrow[0] or wide[0] not in (narrow[1], 2 * narrow[1]):
            continue
        gated = wide[0] == 2 * narrow[1]
        for variant in _variants(module, act, gated):
            for norm in norms:
                yield Experts(
                    first=first,
                    down=down,
                    act=act,
                    gated=gated,
                    transposed=transposed,
                    norm=norm,
                    identity=experts > kept,
                    **variant,
                )


def _variants(module: nn.Module, act: str, gated: bool) -> Iterator[dict[str, Any]]:
    """Ways from the first projection to h, the simple ones first."""
    written = (None,) if act in module._modules else WRITTEN
    if not gated:
        yield from ({"written": name} for name in written)
        return
    limits = [None, *(name for name in _LIMITS if isinstance(getattr(module, name, None), int | float))]
    for name, interleaved, limit, plus in product(written, (False, True), limits, (0.0, 1.0)):
        yield {"written": name, "interleaved": interleaved, "limit": limit, "plus": plus}
    if written == (None,) and hasattr(type(module), "_apply_gate"):
        yield {"own_gate": True}
