"""The configuration of a run: every choice that shapes it, typed, validated and documented.

A recipe is read from a YAML file and the command line (``arguments.py``). Lengths that follow the length of a
run (warm-up, L1 stages, mixing) are fractions of ``max_steps``, so a recipe works at any length.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from hf_sparse.activations.config import ORIGINAL
from hf_sparse.config import SparsityConfig
from hf_sparse.schedules import SineStages

_DENSE = "none"


def _free(default: Any) -> Any:
    """A field that a resumed run may change: it does not alter what is learned."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of finetune.py.

    Raises:
        ValueError: a field is out of its range or contradicts another; the message says what to change.

    """

    # ---- model
    model: str = "meta-llama/Llama-3.2-1B"
    """Model to start from: a Hub id or a local folder that AutoModelForCausalLM can load."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model; none means its main branch."""

    # ---- sparsity
    patch: str | dict[str, Any] = "relu"
    """What the model is patched with: the name of an activation, or all of a SparsityConfig, such as
    {activation: {name: fatrelu, threshold: 0.01}, layers: [0, 1]}. none trains the dense baseline."""

    mix_until: float = 0.0
    """Fraction of max_steps over which the original activation is mixed out, linearly; 0 swaps at once."""

    l1_start: float = 0.0
    """Fraction of max_steps trained without L1 at first (stage 0 of ProSparse: substitution only)."""

    l1_boundaries: list[float] = field(default_factory=list)
    """Fractions of max_steps at which the stages of the L1 coefficient end, rising; empty means no L1."""

    l1_targets: list[float] = field(default_factory=list)
    """L1 coefficient reached at each boundary: constant in the first stage, then along sine curves. The
    penalty is the mean of |h| over tokens and neurons, summed over blocks; h enters the down projection."""

    l1_scale: float = 1.0
    """Factor on all l1_targets, to fit a published schedule to another model."""

    # ---- data
    dataset: str = "allenai/c4"
    """Text to train on: a Hub id (streamed), or a local file or folder of json, json.gz, jsonl, parquet or
    txt. Files of a folder with the word validation, valid, val, dev or eval in their name are the validation
    split; files with the word test are left alone."""

    dataset_config: str | None = None
    """Configuration of a Hub data set; none means its only one (en for allenai/c4)."""

    dataset_revision: str | None = None
    """Branch, tag or commit of a Hub data set; none means its main branch."""

    text_field: str = "text"
    """Column that holds the text of a document."""

    txt_unit: Literal["paragraph", "line", "document"] = "paragraph"
    """What one document is in txt files: text between blank lines, one line, or the whole file."""

    sequence_length: int = 1024
    """Tokens per training sequence. Documents are joined by end-of-text tokens and cut to this length."""

    shuffle_buffer: int = 1000
    """Documents in a block that is shuffled as a whole, in each stream; 1 keeps the order of the files."""

    data_streams: int = 8
    """Streams the data is divided into. Each global batch takes equally many sequences from each, so the
    order does not depend on the number of processes, which must divide this number."""

    epochs: int = 1
    """Passes over the data before a run that wants more ends with an error; each pass is reshuffled."""

    holdout: float = 0.01
    """Share of documents held out for evaluation, chosen by a hash of their text, where the data set has no
    validation split."""

    # ---- optimisation
    max_steps: int = 1000
    """Optimizer updates in the whole run."""

    global_batch: int = 32
    """Sequences per update, over all processes; a multiple of data_streams."""

    micro_batch: int = _free(4)
    """Sequences per forward on one process; smaller takes less memory, gradients are accumulated."""

    learning_rate: float = 3e-5
    """Peak learning rate of AdamW."""

    warmup: float = 0.05
    """Fraction of max_steps over which the learning rate rises linearly."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""

    final_learning_rate: float = 0.1
    """Learning rate at the last update, as a share of the peak."""

    weight_decay: float = 0.1
    """Weight decay of AdamW; never applied to norms, biases and other vectors."""

    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""

    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""

    clip_norm: float = 1.0
    """Gradients are scaled down to this norm over all parameters; 0 turns clipping off."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16 with float32 master weights and optimizer."""

    gradient_checkpointing: bool = _free(False)
    """Recompute activations in backward: less memory, about a third more time."""

    seed: int = 42
    """Seed of the data order and of dropout."""

    # ---- evaluation
    eval_every: int = _free(250)
    """Updates between evaluations; 0 evaluates only before the first and after the last update."""

    eval_tokens: int = 131_072
    """Tokens of held-out text in an evaluation."""

    # ---- output
    output_dir: str = _free("runs/finetune")
    """Folder for checkpoints, logs and, under final/, the trained model."""

    save_every: int = _free(250)
    """Updates between checkpoints; the last update always writes one."""

    keep_checkpoints: int = _free(2)
    """Newest checkpoints to keep."""

    resume: bool = _free(False)
    """Continue from the newest valid checkpoint in output_dir, or start if there is none."""

    log_every: int = _free(10)
    """Updates between training records in log.jsonl and TensorBoard."""

    tensorboard: bool = _free(True)
    """Write TensorBoard logs beside log.jsonl."""

    progress: bool = _free(True)
    """Show a progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", _patch(self.patch))
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name), hints[f.name])
        for name in [
            "sequence_length",
            "shuffle_buffer",
            "data_streams",
            "epochs",
            "max_steps",
            "global_batch",
            "micro_batch",
            "eval_tokens",
            "save_every",
            "keep_checkpoints",
            "log_every",
        ]:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        for name in ("mix_until", "l1_start", "warmup", "final_learning_rate", "holdout"):
            _require(
                0 <= getattr(self, name) <= 1, name, getattr(self, name), "it must be a fraction, 0 to 1"
            )
        for name in ("l1_scale", "weight_decay", "clip_norm", "eval_every", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "it must be at least 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "it must be in [0, 1)")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "it must be positive")
        _require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "it must be at least 2")
        _require(
            self.eval_tokens >= self.sequence_length,
            "eval_tokens",
            self.eval_tokens,
            f"it must hold at least one sequence (sequence_length={self.sequence_length})",
        )
        _require(
            self.global_batch % self.data_streams == 0,
            "global_batch",
            self.global_batch,
            f"each stream gives equally many, so it must be a multiple of data_streams={self.data_streams}",
        )
        _require(
            all(0 <= b <= 1 for b in self.l1_boundaries),
            "l1_boundaries",
            self.l1_boundaries,
            "they are fractions of max_steps, 0 to 1",
        )
        if self.patch == _DENSE and (self.mix_until or self.has_l1):
            wrong = "mix_until" if self.mix_until else "l1_targets"
            raise ValueError(
                f"{wrong}={getattr(self, wrong)!r} has no meaning with patch={_DENSE!r}, the dense baseline; "
                "leave it out or choose an activation."
            )
        try:
            SineStages(tuple(self.l1_boundaries), tuple(self.l1_targets), self.l1_start)
        except ValueError as error:
            raise ValueError(f"l1_boundaries, l1_targets, l1_start: {error}") from None

    @property
    def has_l1(self) -> bool:
        """Whether the L1 coefficient is ever above 0."""
        return self.l1_scale > 0 and any(t > 0 for t in self.l1_targets)

    def sparsity_config(self, mix: float = 1.0) -> SparsityConfig | None:
        """What the model is patched with, at a share ``mix`` of the new activation; None: it stays dense."""
        if self.patch == _DENSE:
            return None
        config = SparsityConfig.read(self.patch)
        return config.changed(activation=config.activation.with_mix(mix))

    def l1_schedule(self) -> SineStages:
        """The L1 coefficient as a function of the step, with ``l1_scale`` applied."""
        targets = tuple(t * self.l1_scale for t in self.l1_targets)
        return SineStages(tuple(self.l1_boundaries), targets, self.l1_start).scaled(self.max_steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def changed(self, earlier: dict[str, Any]) -> list[str]:
        """Fields that make this another run than the one started with ``earlier``, as "name: then -> now"."""
        now = self.to_dict()
        fixed = [f.name for f in fields(self) if not f.metadata.get("free")]
        return [
            f"{name}: {earlier.get(name)!r} -> {now[name]!r}"
            for name in fixed
            if earlier.get(name, _default(name)) != now[name]
        ]


def check_keys(values: dict[str, Any], where: str) -> None:
    """Refuse keys that are no field of a recipe.

    Raises:
        ValueError: names the unknown keys and the known ones.

    """
    known = [f.name for f in fields(Recipe)]
    check_renamed(values, f"{where}: ")
    if unknown := sorted(str(k) for k in values.keys() - set(known)):
        raise ValueError(f"{where}: unknown fields {', '.join(unknown)}; known fields: {', '.join(known)}.")


_RENAMED = {
    "activation": "patch, such as `patch: relu` (on the command line `--patch relu`)",
    "threshold": "patch, such as `patch: {activation: {name: fatrelu, threshold: 0.01}}`",
    "shift": "patch, such as `patch: {activation: {name: shifted_relu, shift: 0.1}}`",
    "mix": "mix_until, the fraction of max_steps over which it grows",
}


def check_renamed(names: Iterable[str], before: str) -> None:
    """Refuse names that stand for a field of another name.

    Raises:
        ValueError: says which field; the message begins with ``before`` and the name.

    """
    for name in names:
        if name in _RENAMED:
            raise ValueError(f"{before}{name} is no field of a recipe; it is part of {_RENAMED[name]}.")


def _patch(value: Any) -> str | dict[str, Any]:
    """The shortest form of what stands for a SparsityConfig; ``"none"`` for the dense baseline."""
    if value is None or value == _DENSE:
        return _DENSE
    try:
        config = SparsityConfig.read(value)
        if config.activation.mix != 1:
            raise ValueError(
                f"activation.mix={config.activation.mix} is not for a recipe; mix_until says until when the "
                "original activation is mixed out."
            )
    except ValueError as error:
        raise ValueError(f"patch: {error}") from None
    given = {k: v for k, v in config.to_dict().items() if k != "format_version" and v is not None}
    if given == {"activation": {"name": ORIGINAL}}:
        return _DENSE
    return config.activation.name if given == {"activation": {"name": config.activation.name}} else given


def _default(name: str) -> Any:
    return getattr(Recipe(), name)


def _require(ok: bool, name: str, value: Any, mend: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} cannot be used: {mend}.")


def _check_type(name: str, value: Any, hint: Any) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if name == "patch":
        return  # SparsityConfig has checked it
    if origin is Literal:
        _require(value in arguments, name, value, f"choose one of {', '.join(arguments)}")
    elif origin is list:
        _require(isinstance(value, list), name, value, "it must be a list")
        for item in value:
            _check_type(name, item, arguments[0])
    elif origin is types.UnionType:
        _require(value is None or isinstance(value, arguments[0]), name, value, "it must be text or none")
    elif hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _require(number, name, value, "it must be a finite number")
    elif hint is int:
        _require(type(value) is int, name, value, "it must be a whole number")
    else:
        _require(isinstance(value, hint), name, value, f"it must be of type {hint.__name__}")
