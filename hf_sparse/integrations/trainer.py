"""SparsityCallback: methods at work in transformers.Trainer, and in the trainers that are made from it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

import hf_sparse
from hf_sparse.checks import shown
from hf_sparse.config import SparsityConfig
from hf_sparse.integrations.added_loss import AddedLoss
from hf_sparse.integrations.evaluated import EvaluatedSparsity
from hf_sparse.methods import ActingTogether, Method, Training, read_methods

_NAME = "SparsityCallback"
_STATE = "trainer_state.json"


class SparsityCallback(TrainerCallback, ExportableState):
    """What acts during training (docs/methods/index.md), in ``transformers.Trainer`` and TRL's trainers.

    Use::

        hf_sparse.patch(model, "relu")
        Trainer(model, ..., callbacks=[SparsityCallback({"l1": {"boundaries": [1.0], "targets": [0.1]}})])

    Terms are added to the loss of the trainer, whatever it is, with the weight that they have in a batch that
    is neither accumulated nor distributed. Logs get every term, ``task_loss`` without them, and what
    schedules prescribe; evaluations get ``eval_sparsity``, the share of exact zeros that reach the down
    projections. Checkpoints carry the state of methods, in ``trainer_state.json``. Hooks are on the model
    from the beginning of training to its end.

    Sharpness-aware updates are no method and cannot be had this way: they take two gradients, a Trainer one.

    Args:
        methods: by name, the fields of each, as in a recipe; or methods.
        dense: the model as it was before the patch, or what loads it, for methods that learn from it. It is
            moved to the device of training; its parameters are frozen.
        dense_loss: what that model has on the evaluation data, in nats per token, for methods that ask.

    Raises:
        ValueError: an unknown method or field, or a value out of range.

    """

    def __init__(
        self,
        methods: Mapping[str, Any] | Iterable[Method],
        *,
        dense: nn.Module | Callable[[], nn.Module] | None = None,
        dense_loss: float | None = None,
    ) -> None:
        given = read_methods(methods) if isinstance(methods, Mapping) else methods
        self.methods = list(given) if isinstance(given, Iterable) else []
        if not isinstance(given, Iterable) or not all(isinstance(one, Method) for one in self.methods):
            raise ValueError(
                f"methods={shown(methods)} is neither a mapping of methods to their fields, such as "
                '{"l1": {"coefficient": 0.1}}, nor a list of methods.'
            )
        if not (dense is None or isinstance(dense, nn.Module) or callable(dense)):
            raise ValueError(
                f"dense={shown(dense)} is neither a model nor a function that loads one, such as "
                "lambda: AutoModelForCausalLM.from_pretrained(name)."
            )
        self._dense, self._dense_loss = dense, dense_loss
        self._acting: ActingTogether | None = None
        self._added: AddedLoss | None = None
        self._evaluated: EvaluatedSparsity | None = None
        self._trainer: Any = None
        self._told: int | None = None
        self._began_as: SparsityConfig | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Attach to the model.

        Raises:
            ValueError, PatchError: a method cannot act on this model, or not in this trainer.

        """
        self._detach()  # what a failed training, or one with another batch size, has left
        trainer = self._trainer = _calling_trainer()
        if args.n_gpu > 1:
            raise ValueError(
                f"SparsityCallback cannot act in {args.n_gpu} threads of one process (DataParallel): start "
                "one process for each GPU with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES."
            )
        if sum(isinstance(one, SparsityCallback) for one in trainer.callback_handler.callbacks) > 1:
            raise ValueError(
                "there are several SparsityCallbacks in this trainer, and methods would act twice or against "
                "each other: give all methods to one."
            )
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        sparsity = self._began_as = hf_sparse.inspect(model).config
        for method in self.methods:
            method.check(sparsity)
        training = Training(
            model,
            state.max_steps,
            mean=lambda value: trainer.accelerator.reduce(value, "mean"),
            dense=None if self._dense is None else lambda: self._load_dense(args.device),
            dense_loss=self._dense_loss,
            eval_every=_eval_every(args, state),
        )
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._acting = ActingTogether(self.methods, training)
        try:
            _refuse_late_freezing(trainer, model, trained)
            if state.global_step:
                self._acting.load_state_dict(self._saved(state))
            self._acting.before_step(state.global_step + 1)
            self._added = AddedLoss(trainer, model, self._acting)
            self._evaluated = EvaluatedSparsity(model)
        except BaseException:
            self._detach()
            raise
        self._told = None
        state.stateful_callbacks.setdefault(_NAME, self.state())  # a checkpoint without it is continued from
        # Before those that report, so that they get what is added to logs.
        others = [one for one in trainer.callback_handler.callbacks if one is not self]
        trainer.callback_handler.callbacks[:] = [self, *others]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first forward of an update."""
        if self._acting is not None and self._added is not None:
            self._added.step = state.global_step + 1
            self._acting.before_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the update of the optimizer."""
        if self._acting is not None:
            self._acting.after_step(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add terms and prescribed values to a record of training."""
        if self._acting is None or self._added is None or logs is None or "loss" not in logs:
            return
        more = {**self._added.means(), **self._acting.values()}
        logs.update(more)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(more)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the batch that an evaluation has just run."""
        if self._evaluated is not None:
            self._evaluated.count()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Report sparsity; tell methods, of several evaluations at one step of the first."""
        if self._acting is None or self._evaluated is None or metrics is None:
            return
        name = min((key for key in metrics if key.endswith("_loss")), key=len, default="eval_loss")
        report = self._evaluated.report(metrics.get(name, math.nan))
        if report is None:
            return
        found = {f"{name.removesuffix('loss')}sparsity": report.sparsity}
        metrics.update(found)
        self._trainer.log(dict(found))
        if self._told != state.global_step:
            self._told = state.global_step
            self._acting.after_evaluation(state.global_step, report)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let methods finish the model, and take everything off it and the trainer."""
        if self._acting is not None:
            if args.load_best_model_at_end and state.best_model_checkpoint:
                self._go_back(Path(state.best_model_checkpoint))
            self._acting.finish()
            self._tell_of_adapters()
        self._detach()

    def _tell_of_adapters(self) -> None:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model, keep_torch_compile=False)
        now = hf_sparse.inspect(model).config
        if hasattr(model, "get_base_model") and now != self._began_as:
            warnings.warn(
                "methods changed the patch of the model under the adapter (inspect(model).config), and an "
                "adapter that is saved alone does not have it: save the model merged, or keep that config "
                "and patch the base with it before the adapter is loaded.",
                stacklevel=2,
            )

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``: the methods, and what they need to go on."""
        methods = {method.name: method.to_dict() for method in self.methods}
        acting = {} if self._acting is None else self._acting.state_dict()
        return {"args": {"methods": methods}, "attributes": {"methods_state": acting}}

    def _load_dense(self, device: Any) -> nn.Module:
        dense = self._dense
        assert dense is not None
        return (dense if isinstance(dense, nn.Module) else dense()).to(device)

    def _go_back(self, checkpoint: Path) -> None:
        """Let methods give the model what it had when ``checkpoint`` was saved, whose weights it has now."""
        assert self._acting is not None
        state = TrainerState.load_from_json(str(checkpoint / _STATE))
        self._acting.load_state_dict(self._saved(state))
        self._acting.before_step(state.global_step)

    def _saved(self, state: Any) -> dict[str, Any]:
        """What the checkpoint that a training goes on from has of the methods.

        Raises:
            ValueError: it has the state of one that is not at work now.

        """
        own, saved = self.state()["args"]["methods"], state.stateful_callbacks.get(_NAME, {})
        then = saved.get("args", {}).get("methods", own)
        kept: dict[str, Any] = saved.get("attributes", {}).get("methods_state", {})
        if missing := sorted(kept.keys() - own.keys()):
            raise ValueError(
                f"the checkpoint has a state of methods that are not given now: {', '.join(missing)}. Give "
                "the same methods as before, or begin anew."
            )
        if changed := sorted(n for n in own.keys() | then.keys() if own.get(n) != then.get(n)):
            warnings.warn(
                f"the checkpoint was trained with other methods or fields: {', '.join(changed)}; going on "
                "with what is given now.",
                stacklevel=2,
            )
        return kept

    def _detach(self) -> None:
        for one in (self._evaluated, self._added, self._acting):
            if one is not None:
                one.detach()
        self._evaluated = self._added = self._acting = self._trainer = None


def _calling_trainer() -> Any:
    """The trainer that is calling a callback: of its events none hands it on."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(caller, "compute_loss") and hasattr(caller, "callback_handler"):
            return caller
        frame = frame.f_back
    raise RuntimeError("SparsityCallback was called by something that is no transformers.Trainer.")


def _eval_every(args: Any, state: Any) -> int:
    """Updates between evaluations; 0 without."""
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if strategy == "epoch":
        return max(1, round(state.max_steps / max(state.num_train_epochs, 1)))
    return int(state.eval_steps) if strategy == "steps" and state.eval_steps else 0


def _refuse_late_freezing(trainer: Any, model: nn.Module, trained: set[str]) -> None:
    if not isinstance(trainer.model_wrapped, DistributedDataParallel):
        return
    if frozen := sorted(trained - {name for name, p in model.named_parameters() if p.requires_grad}):
        raise ValueError(
            f"methods freeze {len(frozen)} parameters ({frozen[0]}, …), and data parallelism, set up "
            "before, waits for the gradients of all. Call requires_grad_(False) on them before the Trainer "
            "is made, or train in one process or with training/finetune.py."
        )
