"""The decode step of ``generate()``, compiled with a static cache, by the means of transformers.

Certificates are no part of the graph. While it runs its operators ask for them: :mod:`triton_ops.advice`.
"""

from __future__ import annotations

import gc
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.hooks import RemovableHandle
from transformers import CompileConfig, GenerationMixin, PreTrainedModel

from hf_sparse.adapters.walk import modules_of
from hf_sparse.errors import PatchError
from hf_sparse.greedy_decoding import greedy_decoding_of
from hf_sparse.modules import SparseExperts, SparseMLP
from hf_sparse.modules.output_layer import asked
from hf_sparse.modules.sparse_block import hooks_on_all_modules
from hf_sparse.modules.surroundings import is_plain
from hf_sparse.packed_attention import pack_attention, stock_attention
from hf_sparse.run_certificates import Memory, RunCertificates
from triton_ops import Certificate
from triton_ops.advice import advised_by

BACKEND = "inductor"
OPTIONS = {"cpp.threads": 1, "size_asserts": False}
"""On a CPU. Between two products a step works on a few thousand numbers: to wake threads takes longer. Shapes
and strides are guarded, and to check them again in the graph takes half a millisecond."""
_FORMER = "_hf_sparse_former_generation"
_FIELDS = ("cache_implementation", "compile_config")


class CompiledStep:
    """What ``generate()`` calls for every token after the prompt.

    transformers would keep a compiled method of ``model`` there. In a copy of the model that is still the one
    of the original, and runs on its weights.
    """

    def __init__(self, model: PreTrainedModel, config: CompileConfig, *, certify: bool) -> None:
        self.model, self.certify, self.memory = model, certify, Memory()
        self._config = config
        self._call: Any = None
        self._hookless: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if hooks_on_all_modules() or self._is_hooked():
            return self.model(*args, **kwargs)
        greedy = greedy_decoding_of(self.model)
        if greedy is None:
            return self._graph(*args, **kwargs)
        return greedy.step(partial(self._graph, *args, **kwargs), sys._getframe(1))

    def _graph(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:  # an attribute may be __call__, too, while the model generates
            call = MethodType(type(self.model).__call__, self.model)
            self._call = torch.compile(call, **self._config.to_dict())
        advice, graphs = _advice.get(), _graphs()
        with nullcontext() if advice is None or advice.step is not self else advised_by(advice):
            outputs = self._call(*args, **kwargs)
        if _graphs() != graphs:
            gc.collect()  # Dynamo leaves modules and weights in cycles, which hold them until then
        return outputs

    def begin(self) -> None:
        """Called by each ``generate()`` before its first step."""
        self._hookless = None

    def _is_hooked(self) -> bool:
        """Whether a module has a hook, which a graph need not have, nor be able to have.

        Nobody who calls ``generate()`` sees that it is compiled. To have torch look for hooks at every step
        takes a millisecond; here it is done at the first one, and when a hook has been registered since.
        """
        last = RemovableHandle.next_id
        if self._hookless != last:
            if any(one._forward_hooks or one._forward_pre_hooks for one in modules_of(self.model)):
                return True
            self._hookless = last
        return False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which compile anew."""
        return {**vars(self), "_call": None, "_hookless": None}


def _graphs() -> int:
    """How many graphs have been made."""
    return counters["stats"]["unique_graphs"]


class _Advice:
    """What operators in the graph are told during one ``generate()``."""

    def __init__(self, step: CompiledStep) -> None:
        self.step, self.certificates = step, RunCertificates(step.memory)
        blocks = (one for one in modules_of(step.model) if step.certify and isinstance(one, SparseMLP))
        weights = (block.worth_certifying() for block in blocks)
        # Of an inference tensor torch counts no changes.
        self._certified = {w.data_ptr() for w in weights if w is not None and not w.is_inference()}
        greedy = greedy_decoding_of(step.model) is not None
        self._output = step.model.get_output_embeddings() if greedy else None

    @property
    def addresses(self) -> bytes:
        """As :class:`triton_ops.advice.Adviser` says; the weight of the output layer may have moved."""
        weight = None if self._output is None else self._output._parameters.get("weight")
        outputs = {weight.data_ptr()} if weight is not None and is_plain(weight) else set()
        return array("q", sorted(self._certified | outputs)).tobytes()

    def certificate(self, weight: Tensor) -> Certificate | None:
        return self.certificates.of(weight) if weight.data_ptr() in self._certified else None

    def product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        one = asked()
        return None if one is None else one.product(x, weight)


_advice: ContextVar[_Advice | None] = ContextVar("hf_sparse_advice", default=None)


@contextmanager
def compiled_steps(model: GenerationMixin) -> Iterator[None]:
    """In here ``model`` generates, by its compiled step if it has one."""
    step, here = vars(model).get("_compiled_call"), cast(PreTrainedModel, model)
    if not isinstance(step, CompiledStep) or step.model is not here:
        yield
        return
    step.begin()
    if here.device.type != "cpu":
        yield
        return
    advice = _Advice(step)
    token = _advice.set(advice)
    try:
        yield
    finally:
        _advice.reset(token)
        advice.certificates.end()


def compile_step(model: PreTrainedModel, *, certify: bool) -> None:
    """Have ``model.generate`` compile its decode step when it first takes one, and ``certify`` its MLPs.

    Raises:
        PatchError: transformers cannot compile this model as one graph; or it is to certify where there are
            no certificates for graphs, on another device than a CPU.

    """
    own: Any = getattr(model, "generation_config", None)
    if own is None or not model.can_generate() or not getattr(model, "_can_compile_fullgraph", False):
        raise PatchError(
            f"compile=True is for models that generate text with a static cache, and transformers has none "
            f"for {type(model).__name__}; leave compile out."
        )
    if certify and model.device.type != "cpu":
        raise PatchError(
            f"certify=True and compile=True go together on the CPU, and this model is on {model.device}; "
            "leave one of them out."
        )
    stock_step(model)
    former = tuple(getattr(own, name) for name in _FIELDS)
    experts = any(isinstance(module, SparseExperts) for module in modules_of(model))
    config = CompileConfig(fullgraph=not experts, backend=BACKEND)
    if model.device.type == "cpu":
        config.mode, config.options = None, _options()  # type: ignore[assignment]
        pack_attention(model)
    config._compile_all_devices = True  # type: ignore[assignment]  # else never on a CPU
    own.cache_implementation, own.compile_config = "static", config
    vars(model)[_FORMER] = own, former, ("static", config)
    vars(model).update(
        _compiled_call=CompiledStep(model, config, certify=certify), _last_compile_config=config
    )


def _options() -> dict[str, Any]:
    """Of torch's compiler, on a CPU."""
    from torch._inductor import config

    from triton_ops.joined_linears import JoinedLinears

    if config.post_grad_custom_pre_pass is not None:  # somebody's own
        return OPTIONS
    return {**OPTIONS, "post_grad_custom_pre_pass": JoinedLinears()}


def stock_step(model: PreTrainedModel) -> None:
    """Undo :func:`compile_step`."""
    _put_back(model)
    stock_attention(model)
    if vars(model).pop(_FORMER, None) is not None:
        for name in ("_compiled_call", "_last_compile_config"):
            vars(model).pop(name, None)


@contextmanager
def stock_generation(model: PreTrainedModel) -> Iterator[None]:
    """While in here, fields of the generation config are what they were, but for those changed since."""
    changed = _put_back(model)
    try:
        yield
    finally:
        for name, value in changed.items():
            setattr(model.generation_config, name, value)


def _put_back(model: PreTrainedModel) -> dict[str, Any]:
    """The fields that were ours until now."""
    changed: dict[str, Any] = {}
    own, former, ours = vars(model).get(_FORMER, (None, (), ()))
    if own is not None and own is model.generation_config:
        for name, before, now in zip(_FIELDS, former, ours, strict=True):
            if getattr(own, name) == now:
                setattr(own, name, before)
                changed[name] = now
    return changed
