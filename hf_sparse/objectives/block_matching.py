"""Each MLP block against its dense original, on the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hf_sparse.forwards import in_decoder

_LEAST = 1e-12


class BlockMatching:
    """Collects, in each training forward of a model, how far its MLP blocks are from dense ones.

    For the input ``x`` of a block, detached, the error of a token is ``|y - t|^2 / |t|^2``, where ``y`` is
    the output of the block and ``t`` that of its dense original on the same ``x``. Relative by token, for
    single tokens have outputs a thousand times as large as all others. What goes on to the next layer is
    detached, too: gradients stay within a block, and nothing is kept for a backward through attention.

    In evaluation mode and without gradient the model is as it is. Right under (non-reentrant) gradient
    checkpointing: what a recomputation passes through the hooks again is not counted.

    Args:
        model: the bare model.
        pairs: by block in it, the dense module that takes the same arguments. They are called without
            gradient, and get floating arguments in the dtype of their parameters.
        follow: whose outputs the layers after a block get.

    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Mapping[nn.Module, nn.Module],
        follow: Literal["student", "teacher"],
    ) -> None:
        self._follow = follow
        self._errors: list[tuple[bool, Tensor]] = []  # of each block, and whether it is in a decoder
        self._in_forward = False
        self._handles = [
            # These two tell a forward from a recomputation, which reruns layers without the model around.
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        names = {module: name for name, module in model.named_modules()}
        for block, dense in pairs.items():
            compare = self._compare(dense, in_decoder(model, names[block]))
            self._handles += [
                block.register_forward_pre_hook(self._cut, with_kwargs=True),
                block.register_forward_hook(compare, with_kwargs=True),
            ]

    def value(self, mask: Tensor | None = None, decoder_mask: Tensor | None = None) -> Tensor:
        """The mean over tokens and blocks of the last forward: a float32 scalar with gradient.

        Args:
            mask: ``[B, S]``, 0 at tokens that do not count.
            decoder_mask: the same for the blocks of a decoder that has an encoder.

        Raises:
            RuntimeError: there was no training forward, or one whose layers carry no gradient.
            ValueError: a block got other tokens than ``mask`` has.

        """
        if not self._errors:
            raise RuntimeError(
                "no forward in training mode and with gradient has run since the blocks are matched. With "
                "gradient checkpointing use activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        masks = mask, decoder_mask
        means = [
            error.mean() if (own := masks[decoder]) is None else _masked_mean(error, own)
            for decoder, error in self._errors
        ]
        return torch.stack([mean.to(means[0].device) for mean in means]).mean()

    def remove(self) -> None:
        """Take the hooks off the model and drop what was collected."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._errors = [], []

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._errors = []
        self._in_forward = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_forward = False

    @staticmethod
    def _cut(block: nn.Module, args: Any, kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return None
        return tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}

    def _compare(self, dense: nn.Module, decoder: bool) -> Any:
        dtype = next(dense.parameters()).dtype

        def hook(block: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if not (block.training and torch.is_grad_enabled()):
                return None
            with torch.no_grad():
                own = {name: _as(value, dtype) for name, value in kwargs.items()}
                wanted = cast(Tensor, dense(*(_as(value, dtype) for value in args), **own))
            target = wanted.float()
            distance = (output.float() - target).square().sum(-1)
            error = distance / target.square().sum(-1).clamp(min=_LEAST)
            if self._in_forward:
                self._errors.append((decoder, error.flatten()))
            return output.detach() if self._follow == "student" else wanted.to(output.dtype)

        return hook


def _masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    counted = mask.flatten().to(error.device).bool()
    if counted.shape != error.shape:
        raise ValueError(
            f"a block received {error.numel()} tokens of a batch of {counted.numel()}, so padding cannot be "
            "told from text there; give batches without padding."
        )
    return torch.where(counted, error, 0).sum() / counted.count_nonzero().clamp(min=1)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
