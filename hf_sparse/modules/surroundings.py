"""What is going on around a call that forbids to read weights directly, or to touch their memory.

Fake tensors, transforms of ``torch.func``, forward-mode derivatives, function modes, and functions of torch
that somebody replaced: each wants the calls that the stock block makes, and would not see those of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

_LINEAR = F.linear
_FORWARDS: dict[type[nn.Module], object] = {cls: cls.forward for cls in (nn.Linear, Conv1D)}
"""What the linear classes came with; None of a subclass that computes something else."""
_Linear = TypeVar("_Linear", bound=type[nn.Linear])


def transformed() -> bool:
    """Whether tensors are fake, or carry more than values; not to be asked while compiling."""
    # Not public. A torch without one of these has another way, and our own tests of it fail.
    return (
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def overridden() -> bool:
    """Whether calls of linear layers may be made to do something else; not to be asked while compiling."""
    if F.linear is not _LINEAR:
        return True
    return torch._C._len_torch_function_stack() > 0 and any(
        not isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack()
    )


def is_plain(weight: object) -> bool:
    """Whether ``weight`` is a parameter and nothing more: not quantised, nor a part of one that is split.

    ``torch.export`` has fake tensors in their places, unless it is strict.
    """
    return type(weight) is nn.Parameter or (torch.compiler.is_compiling() and type(weight) is FakeTensor)


def with_own_forward(cls: _Linear) -> _Linear:
    """Mark a subclass of ``Linear`` of ours as one that computes the same."""
    _FORWARDS[cls] = cls.forward
    return cls


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Linear`` or ``Conv1D`` and its class computes what it came with.

    Or a subclass of transformers' own that computes the same in other words, as Falcon's.
    """
    cls = type(module)
    if cls not in _FORWARDS and issubclass(cls, nn.Linear) and not torch.compiler.is_compiling():
        is_theirs = cls.__module__.startswith("transformers.models.")
        _FORWARDS[cls] = cls.forward if is_theirs and _multiplies(cls) else None
    known = _FORWARDS.get(cls)
    return known is not None and cls.forward is known


def only_multiplies(linear: nn.Module, *, transposed: bool = False) -> bool:
    """Whether a call of ``linear`` does no more than multiply with its weight.

    That of a ``Conv1D`` is transposed, and of no use but to who takes it so.
    """
    if not has_own_forward(linear) or (type(linear) is Conv1D and not transposed):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    return "forward" not in vars(linear) and "bias" in linear._parameters


def _multiplies(cls: type[nn.Linear]) -> bool:
    """Whether the forward of ``cls`` needs a weight and a bias only, and computes what ``Linear`` does."""
    x, weight, bias = (torch.linspace(-1, 2, n, dtype=torch.float64, device="cpu") for n in (6, 15, 5))
    x, weight = x.reshape(2, 3), weight.reshape(5, 3)
    for own in (None, bias):
        stand_in = object.__new__(nn.Module)
        vars(stand_in).update(weight=weight, bias=own, training=False)
        try:
            y = cls.forward(stand_in, x)  # type: ignore[arg-type]
        except Exception:  # it needs more
            return False
        if not isinstance(y, Tensor) or not torch.allclose(y, F.linear(x, weight, own)):
            return False
    return True


@contextmanager
def outside() -> Iterator[None]:
    """Outside of all modes and transforms, to move a real weight in memory."""
    with ExitStack() as stack:
        if transformed():
            stack.enter_context(_disable_current_modes())
            if torch._C._functorch.maybe_current_level() is not None:
                from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

                stack.enter_context(temporarily_clear_interpreter_stack())
        yield
