"""``generate()`` that decodes greedily by :func:`triton_ops.greedy_linear`, without all of the output layer.

Greedy decoding without logits processors looks at nothing but the largest logit. So the calls of the model
that transformers' own loop makes, and no others, may leave out the logits that are proven not to be it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

import triton_ops
from hf_sparse.adapters.walk import modules_of
from hf_sparse.errors import PatchError
from hf_sparse.modules import DecodingLinear, OutputLayer
from hf_sparse.modules.decoding_linear import become, is_linear
from hf_sparse.modules.output_layer import asking
from hf_sparse.modules.sparse_block import hooks_on_all_modules
from hf_sparse.modules.surroundings import is_plain
from hf_sparse.run_certificates import Memory, RunCertificates
from triton_ops.advice import advised_by

WORTHWHILE = 32
"""New tokens from which a certificate, which takes as long as several tokens, is made."""

_MARK = "_hf_sparse_greedy_decoding"
_LOOP = GenerationMixin._sample.__code__
"""transformers' own: of nobody else it is known that he looks at the largest logit only."""


class GreedyDecoding:
    """That a model decodes in this way: an attribute of the model object."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        """Not the model in whose attributes this is, if that is a shallow copy."""
        self.memory = Memory()
        self._lock = threading.Lock()
        self._runs = 0

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of ``model.__call__``, by which name the loop calls the model, while it generates."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        return self.step(lambda: self.model(*args, **kwargs), sys._getframe(1))

    def step(self, call: Callable[[], Any], caller: FrameType) -> Any:
        """What ``call`` of the model gives ``caller``."""
        run = _run.get()
        if run is None or run.greedy is not self or caller.f_code is not _LOOP:
            return call()
        if not run.begun:
            run.begun = True
            run.search = GreedySearch(self) if _looks_at_the_largest(caller.f_locals) else None
        if run.search is None or run.search.is_watched():
            return call()
        return run.search.step(call)

    def begin(self) -> bool:
        """Have the loop call :meth:`call`; False if somebody else has it call something else."""
        own = vars(self.model)
        with self._lock:
            if not self._runs and "__call__" in own:
                return False
            own["__call__"] = self.call
            self._runs += 1
        return True

    def end(self) -> None:
        """Undo :meth:`begin`."""
        with self._lock:
            self._runs -= 1
            if not self._runs:
                vars(self.model).pop("__call__", None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make certificates of their own."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]


class GreedySearch:
    """One ``generate()`` that decodes greedily.

    The first step is computed in full, and compared with what the model returns: only where the output layer
    is called once, and its logits are returned as they are, may later ones be less than all.
    """

    def __init__(self, greedy: GreedyDecoding) -> None:
        self.greedy, self.layer = greedy, greedy.model.get_output_embeddings()
        self.certificates = RunCertificates(greedy.memory)
        self._may_leave_out: bool | None = None
        """None before the first step."""
        self._given: list[_Given] = []
        """What the output layer has returned in this step."""

    def is_watched(self) -> bool:
        """Whether somebody else may look at logits, or makes them in another way."""
        if type(self.layer) is not OutputLayer or hooks_on_all_modules():
            return True
        both = self.greedy.model, self.layer
        return any(one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one) for one in both)

    def step(self, call: Callable[[], Any]) -> Any:
        """What the model returns of one step.

        Raises:
            RuntimeError: the model has begun to do more with its output layer than in the first step.

        """
        self._given = []
        with asking(self):
            outputs = call()
        logits, given = getattr(outputs, "logits", None), self._given
        as_it_is = len(given) == 1 and given[0].is_unchanged(logits)
        if self._may_leave_out is None:
            self._may_leave_out = as_it_is
        elif self._may_leave_out and given and not as_it_is:
            raise self._error("to change its logits after the output layer")
        self._given = []
        return outputs

    def logits(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` to ``[B, T, V]``; -infinity for what cannot be the largest, if that is of use."""
        if self._may_leave_out and self._given:
            raise self._error("to call its output layer more than once")
        one_each = self._may_leave_out and x.ndim == 3 and x.shape[1] == 1
        found = self.layer.multiplied(x) if one_each else None
        if found is None or not is_plain(found[0]) or found[0].is_inference():
            y = DecodingLinear.forward(self.layer, x)
        else:
            weight, bias = found
            y = triton_ops.greedy_linear(x, weight, bias, self.certificates.of(weight))
        self._given.append(_Given.of(y, whole=self._may_leave_out is None))
        return y

    def product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """:meth:`logits`, if ``weight`` of a product in a graph is that of the layer."""
        own = self.layer._parameters.get("weight")
        is_own = own is not None and weight.data_ptr() == own.data_ptr() and weight.shape == own.shape
        if not is_own:
            return None
        with advised_by(None):  # what cannot be the kernel for it is a product again
            return self.logits(x)

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self.greedy.model).__name__} has begun {what}, which leaves out logits that cannot be "
            "the largest. Call hf_sparse.prepare(model), without greedy_output=True."
        )


@dataclass(frozen=True)
class _Given:
    """Logits as the output layer has returned them."""

    logits: Tensor
    version: int | None
    copy: Tensor | None
    """In inference mode, where torch counts no changes."""

    @classmethod
    def of(cls, logits: Tensor, *, whole: bool) -> _Given:
        counted = not logits.is_inference()
        copy = logits.clone() if whole or not counted else None
        return cls(logits, logits._version if counted else None, copy)

    def is_unchanged(self, found: object) -> bool:
        """Whether ``found``, what the model returns, is this very memory, with the same bits."""
        own = self.logits
        if not isinstance(found, Tensor) or found.dtype != own.dtype or found.stride() != own.stride():
            return False
        if found.shape != own.shape or found.data_ptr() != own.data_ptr():
            return False
        if self.version is not None and self.version != own._version:
            return False
        return self.copy is None or torch.equal(self.copy.view(torch.uint8), own.view(torch.uint8))


@dataclass
class _Run:
    """One ``generate()`` of a model that decodes in this way."""

    greedy: GreedyDecoding
    begun: bool = False
    search: GreedySearch | None = None


_run: ContextVar[_Run | None] = ContextVar("hf_sparse_generate", default=None)


def generate(call: Callable[[], Any], model: GenerationMixin) -> Any:
    """What ``GenerationMixin.generate`` does, ``call``."""
    found = greedy_decoding_of(model)
    if found is None or not found.begin():
        return call()
    run = _Run(found)
    token = _run.set(run)
    try:
        return call()
    finally:
        _run.reset(token)
        found.end()
        if run.search is not None:
            run.search.certificates.end()


def greedy_decoding_of(model: object) -> GreedyDecoding | None:
    """How ``model`` decodes greedily, if it does so in this way."""
    found: GreedyDecoding | None = vars(model).get(_MARK)
    return found if found is not None and found.model is model else None


def _looks_at_the_largest(variables: Mapping[str, Any]) -> bool:
    """Whether the loop, whose variables these are, looks at nothing else, and often enough."""
    names = ("self", "input_ids", "generation_config", "logits_processor")
    if any(name not in variables for name in names):
        return False
    model, input_ids, config, processors = (variables[name] for name in names)
    if model.training or len(processors):
        return False
    if config.get_generation_mode() is not GenerationMode.GREEDY_SEARCH:
        return False
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return False
    return bool(config.max_length - input_ids.shape[1] >= WORTHWHILE)


def require_output_layer(model: PreTrainedModel) -> None:
    """See to it that :func:`decode_greedily` can do what it is to do.

    Raises:
        PatchError: the model has no output layer whose products are known, or does not go on with a prompt.

    """
    name, layer = type(model).__name__, model.get_output_embeddings()
    if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
        raise PatchError(
            f"greedy_output=True is for models that go on with a prompt, and {name} does not; leave it out."
        )
    if not is_linear(layer) or "forward" in vars(layer) or not is_plain(layer._parameters.get("weight")):
        raise PatchError(
            f"greedy_output=True needs an output layer that is an nn.Linear and nothing more; that of {name} "
            f"is {type(layer).__name__}, perhaps with an adapter, quantised or offloaded. Leave it out."
        )


def decode_greedily(model: PreTrainedModel) -> None:
    """Have ``model.generate`` leave logits out where it decodes greedily; linear layers decode already."""
    become(model.get_output_embeddings(), OutputLayer)
    vars(model)[_MARK] = GreedyDecoding(model)


def stock_decoding(model: PreTrainedModel) -> None:
    """Undo :func:`decode_greedily`; the output layer becomes what it was before."""
    vars(model).pop(_MARK, None)
    for module in modules_of(model):
        if type(module) is OutputLayer:
            become(module, DecodingLinear)
