"""Whether an operator may be called as the function that it is, without torch's dispatcher.

After a layer has streamed its weights the dispatcher's code is in no cache any more, and going through it
takes about a tenth of a millisecond. It is of use only where something watches or changes the call;
:func:`unobserved` asks whether something does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import profiler

# Not public, but all that the dispatcher goes by. Where another version of torch has others, or none, every
# call goes through it.
_QUESTIONS = ("_dispatch_keys", "_dispatch_tls_local_include_set", "_is_torch_function_mode_enabled")
_PLAIN = (Tensor, nn.Parameter)
_KNOWN = all(hasattr(torch._C, name) for name in (*_QUESTIONS, "DispatchKey", "DispatchKeySet"))


def _keys(*names: str) -> object:
    found = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        found = found.add(getattr(torch._C.DispatchKey, name))
    return found


if _KNOWN:  # the second of each is that of inference mode
    _function_mode = torch._C._is_torch_function_mode_enabled
    _include_set, _keys_of = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys
    _OF_TENSORS = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), _keys("CPU", "AutocastCPU")
    _OF_THREADS = _keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")


def is_plain_cpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on the CPU and holds its very numbers: of no subclass, not lazily negated."""
    return _KNOWN and type(tensor) in _PLAIN and _keys_of(tensor) in _OF_TENSORS


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would only find the CPU function of an operator called with ``tensors``.

    That is so without gradient, outside of compilers, tracers, ``torch.func`` transforms, modes (as
    ``torch.set_default_device`` sets one) and ``torch.profiler.profile``, and for dense CPU tensors that are
    of no subclass and not lazily negated. Not noticed are observers in C++ other than the profiler, such as
    ``ExecutionTraceObserver`` on its own, and functions that somebody else registers for these operators.
    """
    if not _KNOWN or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if profiler._is_profiler_enabled or _function_mode():
        return False
    if _include_set() not in _OF_THREADS:
        return False
    for tensor in tensors:  # all() with a generator takes a microsecond more
        if tensor is not None and (type(tensor) not in _PLAIN or _keys_of(tensor) not in _OF_TENSORS):
            return False
    return True
