"""A module that notices when somebody else than its own forward reaches its children or parameters.

What a sparse block keeps about its weights, a layout for decoding and a certificate, is right only while
nobody else sees or changes them. Everything outside (optimizers, sharding, saving, weight synchronisation,
another tool's surgery) gets to them through the module tree: by traversal, as an attribute, in a state dict
or a copy. Each of these ways calls :meth:`GuardedModule.disclose` on its way, with the child or parameter in
hand already: a forward in another thread that asks afterwards who holds it finds it held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch._guards import CompileContext
from torch.compiler import is_dynamo_compiling


class GuardedModule(nn.Module):
    """Calls :meth:`disclose` before its children and parameters are reached from outside.

    Its own methods reach them through ``self._modules`` and ``self._parameters``. What is being
    compiled discloses nothing: Dynamo looks at all parameters, and a graph must not change its own inputs.
    """

    def disclose(self) -> None:
        """Bring all weights into the state that everybody else may rely on; cheap if they are in it."""
        raise NotImplementedError

    def withholds(self) -> bool:
        """Whether there may be anything to disclose: asked for each module that is listed, so it is quick."""
        raise NotImplementedError

    def _reached(self) -> None:
        if not is_dynamo_compiling() and self.withholds() and CompileContext.try_get() is None:
            self.disclose()

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        own = self.__dict__
        if name in own.get("_modules", ()) or name in own.get("_parameters", ()):
            self._reached()
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter) or name in self.__dict__.get("_parameters", ()):
            self._reached()
        super().__setattr__(name, value)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; parameters and buffers of a whole model are listed through it, too."""
        for item in super().named_modules(*args, **kwargs):
            self._reached()  # each time: between two of them the block may have run
            yield item

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module."""
        for item in super().named_children():
            self._reached()
            yield item

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module, also of this one alone."""
        for item in super().named_parameters(*args, **kwargs):
            self._reached()
            yield item

    def train(self, mode: bool = True) -> GuardedModule:
        """As of any module. Evaluation mode, which changes nothing, discloses nothing."""
        if mode:
            self._reached()
        self.training = mode
        for child in self._modules.values():
            if child is not None:
                child.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        self._reached()  # for the layout
        found = super().state_dict(*args, **kwargs)
        self._reached()
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GuardedModule:
        self._reached()
        changed = super()._apply(fn, recurse)
        self._reached()
        return changed

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        self._reached()
        # A shallow copy holds the children, too, and can be told from their one owner by doing so.
        return {**self.__dict__, "_modules": dict(self._modules)}
