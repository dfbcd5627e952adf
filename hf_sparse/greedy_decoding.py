"""``generate()`` that decodes greedily by :func:`triton_ops.greedy_linear`, without all of the output layer.

Greedy decoding without logits processors looks at nothing but the largest logit. So the calls of the model
that ``generate()`` itself makes, and no others, may leave out the logits that are proven not to be it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

import triton_ops
from hf_sparse.errors import PatchError
from hf_sparse.modules import DecodingLinear, OutputLayer
from hf_sparse.modules.decoding_linear import is_linear
from hf_sparse.modules.output_layer import asking
from hf_sparse.modules.sparse_block import hooks_on_all_modules
from hf_sparse.modules.surroundings import is_plain
from triton_ops import Certificate
from triton_ops.certificate import weight_stamp
from triton_ops.dense_linear import quick

WORTHWHILE = 32
"""New tokens from which a certificate, which takes as long as several tokens, is made."""

_HOST = "_hf_sparse_greedy_decoding"
_SPECIAL = ("assistant_model", "custom_generate")
_METHODS = ("generate", "_get_logits_processor", "__call__")


@dataclass
class _Run:
    """One ``generate()``."""

    may_be_greedy: bool = False
    search: GreedySearch | None = None


_run: ContextVar[_Run | None] = ContextVar("hf_sparse_generate", default=None)


class GreedyDecoding:
    """What stands in for three methods of a model object, as its attributes: :func:`decode_greedily`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.memory: list[Certificate] = []
        """Of certificates that were: a list, from which one search at a time takes it."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the class."""
        # By position come inputs and generation config; who gives more may give an assistant.
        special = len(args) > 2 or any(kwargs.get(name) is not None for name in _SPECIAL)
        with _running(_Run(not special)):
            cls: Any = type(self.model)
            return cls.generate(self.model, *args, **kwargs)

    def processors(self, *args: Any, **kwargs: Any) -> Any:
        """As ``_get_logits_processor`` of the class, called when all is known of a ``generate()``."""
        cls: Any = type(self.model)
        found = cls._get_logits_processor(self.model, *args, **kwargs)
        run = _run.get()
        if run is not None and run.may_be_greedy and not found and self._is_greedy(**kwargs):
            run.search = GreedySearch(self)
        return found

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """As the ``__call__`` of the class; ``generate()`` calls it by this name, which nobody else does."""
        run = None if torch.compiler.is_compiling() else _run.get()
        search = None if run is None else run.search
        if search is None or search.host is not self or search.is_watched():
            return self.model(*args, **kwargs)
        with asking(search):
            outputs = self.model(*args, **kwargs)
        search.seen(getattr(outputs, "logits", None))
        return outputs

    def _is_greedy(self, **kwargs: Any) -> bool:
        """Whether nothing but the largest logit will be looked at, often enough."""
        config, begin = kwargs.get("generation_config"), kwargs.get("input_ids_seq_length")
        if config is None or begin is None or config.max_length is None or self.model.training:
            return False
        if config.get_generation_mode() is not GenerationMode.GREEDY_SEARCH:
            return False
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            return False
        return bool(config.max_length - begin >= WORTHWHILE)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make certificates of their own."""
        return {**vars(self), "memory": []}


class GreedySearch:
    """One ``generate()`` that decodes greedily.

    The first logits are computed in full, and compared with what the model returns: only where that is the
    same may later ones be less than all. The certificate is made anew for each: nobody can say what was done
    to the weight since the last one.
    """

    def __init__(self, host: GreedyDecoding) -> None:
        self.host, self.layer = host, host.model.get_output_embeddings()
        self._certificate: Certificate | None = None
        self._stamp: tuple[int, int] | None = None
        self._given: tuple[Tensor, Tensor | None] | None = None
        self._may_leave_out: bool | None = None

    def is_watched(self) -> bool:
        """Whether somebody else may look at logits, or makes them in another way."""
        if type(self.layer) is not OutputLayer or hooks_on_all_modules():
            return True
        both = self.host.model, self.layer
        return any(one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one) for one in both)

    def logits(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` to ``[B, T, V]``; -infinity for what cannot be the largest, if that is of use."""
        weight, bias = self.layer._parameters["weight"], self.layer._parameters["bias"]
        of_use = self._may_leave_out and x.ndim == 3 and x.shape[1] == 1 and is_plain(weight)
        if not of_use or weight.is_inference() or quick(x, weight, bias) is None:
            y = DecodingLinear.forward(self.layer, x)
            self._given = y, y.clone() if self._may_leave_out is None else None
            return y
        y = triton_ops.greedy_linear(x, weight, bias, self._of(weight))
        self._given = y, None
        return y

    def seen(self, logits: object) -> None:
        """What the model has returned of a step, before ``generate()`` looks at it.

        Raises:
            RuntimeError: the model has begun to change its logits after the output layer.

        """
        if self._given is None:
            return
        (given, copy), self._given = self._given, None
        same = isinstance(logits, Tensor) and _lies_as(logits, given)
        if copy is not None:
            self._may_leave_out = same and torch.equal(copy, given)
        elif self._may_leave_out and not same:
            raise RuntimeError(
                f"{type(self.host.model).__name__} has begun to change its logits after the output layer, "
                "which leaves out those that cannot be the largest. Call hf_sparse.prepare(model), without "
                "greedy_output=True."
            )

    def end(self) -> None:
        """Give the memory of the certificate to the next one."""
        if self._certificate is not None:
            self.host.memory[:] = [self._certificate]

    def _of(self, weight: Tensor) -> Certificate:
        stamp = weight_stamp(weight)
        if self._certificate is None or self._stamp != stamp:
            held = self._certificate or (self.host.memory.pop() if self.host.memory else None)
            fits = held is not None and held.rows.shape == weight.shape
            self._certificate, self._stamp = triton_ops.certify(weight, held if fits else None), stamp
        return self._certificate


def _lies_as(one: Tensor, other: Tensor) -> bool:
    where = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return where[0] == where[1]


@contextmanager
def _running(run: _Run) -> Iterator[None]:
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)
        if run.search is not None:
            run.search.end()


def require_output_layer(model: PreTrainedModel) -> None:
    """See to it that :func:`decode_greedily` can do what it is to do.

    Raises:
        PatchError: the model has no output layer whose products are known, or does not go on with a prompt,
            or another tool has taken the place of its methods.

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
    taken = [method for method in _METHODS if method in vars(model)]
    if taken and _HOST not in vars(model):
        raise PatchError(f"{name} has {', '.join(taken)} of another tool as attributes; remove these first.")


def decode_greedily(model: PreTrainedModel) -> None:
    """Have ``model.generate`` leave logits out where it decodes greedily; linear layers decode already."""
    stock_decoding(model)
    host = GreedyDecoding(model)
    layer = model.get_output_embeddings()
    assert type(layer) is DecodingLinear, type(layer)
    object.__setattr__(layer, "__class__", OutputLayer)
    methods = (host.generate, host.processors, host.call)
    vars(model).update({_HOST: host, **dict(zip(_METHODS, methods, strict=True))})


def stock_decoding(model: PreTrainedModel) -> None:
    """Undo :func:`decode_greedily`; the output layer becomes what it was before."""
    host = vars(model).pop(_HOST, None)
    if host is None:
        return
    layer = model.get_output_embeddings()
    for name in _METHODS:
        if getattr(vars(model).get(name), "__self__", None) is host:
            del vars(model)[name]
    if type(layer) is OutputLayer:
        object.__setattr__(layer, "__class__", DecodingLinear)
