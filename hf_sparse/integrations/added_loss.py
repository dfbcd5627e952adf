"""Terms of methods in the loss of a trainer, at the scale that it gives its own."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.methods import Acting, Term


class AddedLoss:
    """Wraps ``compute_loss`` of one trainer while it trains.

    Not the output of the model: trainers make a loss from whatever they like, such as label smoothing, a
    function of the user's, preferences, or the log-probabilities that a fused LM head gives.
    """

    def __init__(self, trainer: Any, model: nn.Module, acting: Acting) -> None:
        self._trainer, self._model, self._acting = trainer, model, acting
        self._given = vars(trainer).get("compute_loss")
        self._compute = trainer.compute_loss
        self.step = trainer.state.global_step + 1
        """The update that forwards are for."""
        self._labels: Tensor | None = None
        self._forwards: list[dict[str, Term]] = []
        self._sums: dict[str, Tensor] = {}
        self._updates: set[int] = set()
        self._hook = model.register_forward_hook(self._collect, with_kwargs=True)

        @wraps(self._compute)
        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            return self._compute_loss(*args, **kwargs)

        trainer.compute_loss = compute_loss

    def detach(self) -> None:
        """Give the trainer its own function back."""
        self._hook.remove()
        if self._given is None:
            vars(self._trainer).pop("compute_loss", None)
        else:
            self._trainer.compute_loss = self._given

    def means(self) -> dict[str, float]:
        """Terms, and the loss without them, since this was last asked: means over updates and processes.

        All processes have to ask.
        """
        if not self._updates:
            return {}
        sums = torch.stack(list(self._sums.values())) / len(self._updates)
        means = self._trainer.accelerator.reduce(sums, "mean").tolist()
        found = dict(zip(self._sums, means, strict=True))
        self._sums, self._updates = {}, set()
        return found

    def _trains(self) -> bool:
        return self._model.training and torch.is_grad_enabled()

    def _collect(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._trains():
            return
        batch = dict(kwargs) if not args else {"input_ids": args[0], **kwargs}
        labels, ids = self._labels, batch.get("input_ids")
        if labels is not None and ids is not None and labels.shape == ids.shape:
            batch.setdefault("labels", labels)  # which the trainer has kept to itself
        self._forwards.append(self._acting.loss(self.step, batch, output))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self._trains():
            return self._compute(model, inputs, *args, **kwargs)
        self._forwards, self._labels = [], inputs.get("labels")
        share, divisor = self._shares(inputs, kwargs.get("num_items_in_batch"))
        result = self._compute(model, inputs, *args, **kwargs)
        loss, *others = result if isinstance(result, tuple) else (result,)
        if not self._forwards:
            raise RuntimeError(
                f"{type(self._trainer).__name__} has computed its loss without a call of the model that "
                "SparsityCallback could see, so the terms of its methods would be missing."
            )
        terms = {
            name: Term(_mean([forward[name].value.to(loss.device) for forward in self._forwards]), weight)
            for name, (_, weight) in self._forwards[0].items()
        }
        task = self._acting.task_weight(self.step)
        self._note({"task_loss": loss.detach() / divisor})
        self._note({name: term.value.detach() * share / divisor for name, term in terms.items()})
        parts = [task * loss] if task else []
        parts += [term.weight * share * term.value for term in terms.values() if term.weight]
        total = sum(parts) if parts else 0.0 * loss
        return (total, *others) if isinstance(result, tuple) else total

    def _shares(self, inputs: dict[str, Any], items: Any) -> tuple[Any, int]:
        """By what to multiply a mean over this micro-batch, and by what the trainer divides the loss later.

        Either the trainer averages over a micro-batch and divides by their number later; or it divides a sum
        by ``items``, the tokens of the whole update, at once.
        """
        trainer = self._trainer
        count = trainer.current_gradient_accumulation_steps
        counts_items = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or (
                trainer.compute_loss_func is not None
            )
        if not scaled:
            return 1.0, count
        own = _predicted(inputs, shifts=getattr(trainer, "_loss_shifts_labels", False))
        if items is None or own is None or not counts_items:
            return 1 / count, 1
        processes = 1
        if trainer.args.average_tokens_across_devices:
            processes = trainer.accelerator.num_processes // trainer.get_tp_size()
        return own * processes / items, 1

    def _note(self, values: dict[str, Tensor]) -> None:
        self._updates.add(self.step)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.float()


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def _predicted(inputs: dict[str, Any], *, shifts: bool) -> Tensor | None:
    """How many tokens the loss of a micro-batch is over, as the trainer counts them."""
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if labels is None:
        return None
    if shifts and "shift_labels" not in inputs:
        labels = labels[..., 1:]
    return labels.ne(-100).sum()
