"""The values that linear layers are given: what a pruning of them leaves out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.adapters.pruning import Pruning
from hf_sparse.adapters.roles import input_pruning, readable_norms
from hf_sparse.calibration.distribution import Distribution
from hf_sparse.calibration.magnitudes import Magnitudes, counted, require_finite
from hf_sparse.inputs import named_thresholded
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.observing import Observer, blocks_of


class InputValues(Observer):
    """The input of one linear layer, before anything is left out of it.

    Several linear layers of a layer are given the same tensor, which is then counted once (``shared``).
    """

    def __init__(self, block: Block, linear: nn.Linear, shared: Shared) -> None:
        super().__init__(block)
        self.linear = linear
        self._shared = shared

    @property
    def size(self) -> int:
        """How many weights the layer has."""
        return self.linear.in_features * self.linear.out_features

    @property
    def pruned(self) -> float:
        """The share of what it saw that the layer leaves out now."""
        pruning = input_pruning(self.linear)
        return self.left_out(pruning or Pruning(0.0))

    @property
    def norms(self) -> Tensor | None:
        """What its prunings need, besides the input."""
        return None

    @property
    @abstractmethod
    def total(self) -> int:
        """How many values there were."""

    @abstractmethod
    def pruning(self, share: float) -> Pruning:
        """One that leaves out ``share`` of the values, 0 to 1.

        Raises:
            ValueError: there were no values.

        """

    @abstractmethod
    def left_out(self, pruning: Pruning) -> float:
        """The share of the values that such a ``pruning`` leaves out.

        Raises:
            ValueError: there were no values.

        """

    @abstractmethod
    def count(self, values: Tensor) -> Tensor:
        """Counts of ``values [T, F]`` in buckets, for :meth:`add`."""

    @abstractmethod
    def add(self, counts: Tensor) -> None:
        """Add what :meth:`count` gave for a batch."""

    def _watch(self) -> Iterator[RemovableHandle]:
        yield self.linear.register_forward_pre_hook(self._given)

    def _given(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.add(self._shared.of(args[0], self))

    def update(self, values: Tensor, routed: bool) -> None:
        where = f"the input of a {type(self.linear).__name__} in the layer of {self.block.name}"
        self._shared.counts = require_finite(self.count(values), where)


class InputMagnitudes(InputValues):
    """Their magnitudes, for thresholds around 0."""

    def __init__(self, block: Block, linear: nn.Linear, shared: Shared) -> None:
        super().__init__(block, linear, shared)
        self._magnitudes = Magnitudes()

    @property
    def total(self) -> int:
        return self._magnitudes.total

    def pruning(self, share: float) -> Pruning:
        return Pruning(self._magnitudes.quantile(share))

    def left_out(self, pruning: Pruning) -> float:
        return self._magnitudes.at_most(pruning.threshold)

    def count(self, values: Tensor) -> Tensor:
        return counted(values)

    def add(self, counts: Tensor) -> None:
        self._magnitudes.add(counts)


class WeightedMagnitudes(InputMagnitudes):
    """Their magnitudes times the norms of the layer's columns, as those are now.

    Of a layer that has such a pruning with a center, their distances from that.
    """

    def __init__(self, block: Block, linear: nn.Linear, shared: Shared) -> None:
        super().__init__(block, linear, Shared())  # norms are the layer's own
        self._norms = readable_norms(linear)
        pruning = input_pruning(linear)
        self._given_center = pruning.center if pruning is not None and pruning.weighted else 0.0

    @property
    def norms(self) -> Tensor:
        return self._norms

    def pruning(self, share: float) -> Pruning:
        return Pruning(super().pruning(share).threshold, weighted=True)

    def count(self, values: Tensor) -> Tensor:
        return counted(Pruning(0.0, self._given_center, weighted=True).score(values, self._norms))


class SignedValues(InputValues):
    """They themselves, for thresholds around any center."""

    def __init__(self, block: Block, linear: nn.Linear, shared: Shared) -> None:
        super().__init__(block, linear, shared)
        self._distribution = Distribution()
        self._centers: list[float] = []
        """Of what has been seen; to find the mode takes long."""

    @property
    def total(self) -> int:
        return self._distribution.total

    def pruning(self, share: float) -> Pruning:
        """Around that of 0, median and mode around which least is lost: in mean square, at ``share``."""
        if not self._centers:
            centers = {0.0, self._distribution.quantile(0.5), self._distribution.mode()}
            # Exact in every dtype of a model, so that no dtype takes another one.
            self._centers = sorted(float(torch.tensor(center).bfloat16()) for center in centers)
        found = [(self._distribution.around(center, share), center) for center in self._centers]
        (_, threshold), center = min(found, key=lambda one: (one[0][0], abs(one[1])))
        return Pruning(threshold, center)

    def left_out(self, pruning: Pruning) -> float:
        return self._distribution.within(pruning.center, pruning.threshold)

    def count(self, values: Tensor) -> Tensor:
        return self._distribution.counted(values)

    def add(self, counts: Tensor) -> None:
        self._distribution.add(counts)
        self._centers = []


class Shared:
    """Counts of the last input of a layer: several linear layers are given the same tensor."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self.counts = torch.zeros(0)

    def of(self, values: Tensor, one: InputValues) -> Tensor:
        if values is not self._last:
            self._last = values
            one._see(values, None)
        return self.counts


def of_thresholded(model: nn.Module) -> list[InputValues]:
    """New ones, of the linear layers of ``model`` that leave something out."""
    layers = {layer_of(block.name): block for block in blocks_of(model)}
    shared: dict[tuple[str, type[InputValues]], Shared] = {}
    found: list[InputValues] = []
    for name, linear in named_thresholded(model):
        layer, pruning = layer_of(name), linear.pruning
        assert pruning is not None
        kind = WeightedMagnitudes if pruning.weighted else SignedValues if pruning.center else InputMagnitudes
        found.append(kind(layers[layer], linear, shared.setdefault((layer, kind), Shared())))
    return found


def tell_densities(seen: Iterable[InputValues]) -> None:
    """Let each linear layer that leaves something out know which share of its inputs stays."""
    for one in seen:
        # One that saw nothing is in a part that sees no text.
        if isinstance(one.linear, SparseLinear) and one.total:
            one.linear.density = 1 - one.pruned
