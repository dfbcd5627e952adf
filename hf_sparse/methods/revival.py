"""Neurons that no token activates any more are drawn towards new random weights, to fire again."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_sparse.adapters import Block
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.roles import shape
from hf_sparse.errors import PatchError
from hf_sparse.fields import require
from hf_sparse.forwards import Forwards
from hf_sparse.methods.method import Acting, Method, Training

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class Revival(Method):
    """Re-initialisation of dead neurons (arXiv 2603.23198), which a constant L1 penalty makes many of.

    Every ``window`` updates, the gate row w of each neuron that was 0 for all tokens since the last time
    becomes ``(1 - strength) * w + strength * N(0, std**2)``: in a plain block that of the up projection, with
    dReLU both.
    """

    name = "revival"

    window: int = 100
    """Updates without a single activation after which a neuron is dead."""

    strength: float = 0.1
    """Share of the new weights (published: 0.1)."""

    std: float = 0.02
    """Standard deviation of the new weights (published: 0.02)."""

    seed: int = 0
    """Of the new weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, "methods.revival.window", self.window, "it must be at least 1")
        require(0 < self.strength <= 1, "methods.revival.strength", self.strength, "it must be in (0, 1]")
        require(self.std > 0, "methods.revival.std", self.std, "it must be positive")
        ok = 0 <= self.seed < 2**32
        require(ok, "methods.revival.seed", self.seed, "it must be in [0, 2**32)")

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.revival has no meaning with patch=none, the dense baseline: no neuron of it is "
                "silent. Leave it out, or choose an activation."
            )

    def attach(self, training: Training) -> Acting:
        return _Acting(self, training)


class _Acting(Acting):
    def __init__(self, method: Revival, training: Training) -> None:
        self._method, self._mean = method, training.mean
        self._forwards = Forwards(training.model, "h", self._look)
        self._blocks = self._forwards.blocks
        try:
            for block in self._blocks:
                _require_trained(block)
        except PatchError:
            self._forwards.remove()
            raise
        self._sizes = [block.intermediate_size for block in self._blocks]
        self._active = torch.zeros(sum(self._sizes), dtype=torch.bool)  # since the window began
        self._now: dict[int, Tensor] = {}  # by block, in this update and process
        self._dead = 0.0
        self._looked = False

    def before_step(self, step: int) -> None:
        self._now = {}  # of an update that was skipped

    def after_step(self, step: int) -> None:
        if not self._looked:  # only now it is known what became of the weights
            for block in self._blocks:
                _deciding(block)
            self._looked = True
        if not self._now:
            raise RuntimeError(
                "revival saw no forward of the model in this update, so it knows no dead neurons."
            )
        # No neuron is dead in a block that no token came to.
        found = [self._now.get(i, torch.ones(size)) for i, size in enumerate(self._sizes)]
        device = next((one.device for one in self._now.values()), torch.device("cpu"))
        self._active |= self._mean(torch.cat([one.to(device).float() for one in found])).cpu() > 0
        if step % self._method.window == 0:
            self._revive(step)
            self._active.zero_()

    def values(self) -> dict[str, float]:
        return {"dead_neurons": self._dead}

    def state_dict(self) -> dict[str, Any]:
        active = b64encode(np.packbits(self._active.numpy()).tobytes()).decode()
        return {"active": active, "dead": self._dead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        bits = np.unpackbits(np.frombuffer(b64decode(state["active"]), np.uint8), count=len(self._active))
        self._active, self._dead = torch.from_numpy(bits.astype(bool)), state["dead"]

    def detach(self) -> None:
        self._forwards.remove()

    def _look(self, index: int, h: Tensor, text: Tensor | None) -> None:
        if not (self._forwards.running and torch.is_grad_enabled()):
            return
        active_TF = h.detach().flatten(0, -2) != 0
        if text is not None:
            active_TF &= text.unsqueeze(-1)
        active_F = active_TF.any(0)
        self._now[index] = self._now[index] | active_F if index in self._now else active_F

    def _revive(self, step: int) -> None:
        method, dead = self._method, ~self._active
        self._dead = float(dead.double().mean())
        # Of the step alone, so that all processes, and a resumed run, draw alike.
        generator = torch.Generator().manual_seed((method.seed << 32) + step)
        for block, dead_F in zip(self._blocks, dead.split(self._sizes), strict=True):
            if not dead_F.any():
                continue
            for weight_FD in _deciding(block):
                new_FD = torch.zeros(weight_FD.shape)
                drawn = torch.randn(int(dead_F.sum()), weight_FD.shape[1], generator=generator)
                new_FD[dead_F] = method.strength * method.std * drawn
                kept_FD = (1 - method.strength * dead_F.float()).unsqueeze(-1).expand_as(new_FD)
                weight_FD.mul_(_as(weight_FD, kept_FD)).add_(_as(weight_FD, new_FD))


def _require_trained(block: Block) -> None:
    """Refuse a block whose neurons could not be revived.

    Raises:
        PatchError: says why.

    """
    if isinstance(block.roles, Experts):
        raise PatchError(
            f"revival cannot tell which neurons of the stacked experts {block.name} are dead; leave it out."
        )
    with torch.enable_grad():
        trained = block.weights()[0][0].requires_grad
    if not trained:
        raise PatchError(
            f"revival changes the projection before the activation of {block.name}, which is not trained "
            "(frozen, quantised, or under an adapter, with which the change would not be saved); leave it "
            "out, or train it."
        )


def _deciding(block: Block) -> list[Tensor]:
    """The weights ``[F, D]`` that decide which neurons are active, to be written to.

    Raises:
        PatchError: they are in pieces that are no rows of neurons.

    """
    count = 2 if getattr(block.module, "relu_up", False) else 1
    weights = [weight for weight, _ in block.weights()[:count]]
    owned = {_memory(parameter) for parameter in block.module.parameters()}
    whole = (block.intermediate_size, block.hidden_size)
    if any(
        shape(weight) != whole or weight.shape != whole or _memory(weight) not in owned for weight in weights
    ):
        raise PatchError(
            f"revival cannot write to the rows of {block.name} the way they are sharded (FSDP1 and ZeRO-3 "
            "flatten them; FSDP2 takes gate and up apart if they are one layer); train without sharding, or "
            "leave it out."
        )
    return weights


def _memory(weight: Tensor) -> int:
    local: Tensor = weight.to_local() if _is_sharded(weight) else weight
    return local.untyped_storage().data_ptr()


def _as(weight: Tensor, whole: Tensor) -> Tensor:
    """``whole`` with the dtype and device of ``weight``, and sharded as that is."""
    whole = whole.to(weight.device, weight.dtype)
    if not _is_sharded(weight):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.contiguous(), weight.device_mesh, weight.placements)


def _is_sharded(weight: Any) -> TypeGuard[DTensor]:
    return hasattr(weight, "placements")
