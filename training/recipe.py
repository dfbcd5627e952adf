"""The configuration of a run: every choice that shapes it, typed, validated and documented.

A recipe is read from a YAML file and the command line (``arguments.py``). Lengths that follow the length of a
run (warm-up, stages of a penalty, mixing) are fractions of ``max_steps``, so a recipe works at any length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from lora import Lora
from mix_in import MixIn
from span_corruption import lengths

from hf_sparse.activations.config import ORIGINAL
from hf_sparse.config import SparsityConfig
from hf_sparse.fields import check_types, require
from hf_sparse.methods import Method, read_methods
from hf_sparse.sharpness import SharpnessConfig
from hf_sparse.sharpness import read as read_sharpness

TRACKERS = ("wandb", "trackio")

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
    """Model to start from: a Hub id or a local folder, of a model for the task."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model; none means its main branch."""

    from_scratch: bool = False
    """Start from random weights, which the seed decides on; config and tokenizer are those of the model."""

    model_config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config to change, so as to train any size from scratch: {num_hidden_layers: 6}.
    One on the command line: --model-config.num_hidden_layers 6."""

    # ---- sparsity
    patch: Any = "relu"
    """What the model is patched with: the name of an activation, or all of a SparsityConfig, such as
    {activation: {name: fatrelu, threshold: 0.01}, layers: [0, 1]}. none trains the dense baseline."""

    methods: dict[str, Any] = field(default_factory=dict)
    """What acts during training, by name, each with its fields: {l1: {boundaries: [1.0], targets: [0.1]}}.
    One field on the command line: --methods.l1.scale 0.3. docs/methods/index.md lists all."""

    lora: dict[str, Any] | None = None
    """Train low-rank adapters, norms and biases instead of all weights; merged into the model at the end.
    Fields: r, alpha, dropout, targets, norms, biases. none trains everything."""

    sharpness: dict[str, Any] | None = None
    """Take every gradient where the loss nearby is higher: {name: sam, rho: 0.05}; other names are
    sparse_sam_fisher, sparse_sam_dynamic, fisher_sam. An update takes twice as long. The fields are in
    docs/methods/sharpness.md."""

    # ---- data
    task: Literal["causal", "span_corruption"] = "causal"
    """What is learned: the next token; or, with an encoder-decoder such as T5, the 15 % of a text that are
    left out, in spans of 3 tokens on average."""

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
    """Tokens per training sequence. Documents are joined by end-of-text tokens and cut to this length; for
    span_corruption, to the length that leaves so many for the encoder: 568 for 512."""

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

    mix_in: dict[str, Any] | None = None
    """A second data set, which a share of the sequences comes from: {dataset: …, share: 0.2}, and if need be
    config, revision, text_field, txt_unit and epochs of its own. Evaluation is on the first alone."""

    max_bad_documents: int = _free(100)
    """Documents that are left out because they are null, no text, damaged JSON or no UTF-8, each with a
    warning that says where it stands; one more ends the run."""

    data_workers: int = _free(0)
    """Processes that prepare the data of each training process; 0 leaves it to a thread. Their number changes
    nothing but speed: look at data_wait in the log."""

    # ---- optimisation
    max_steps: int = 1000
    """Optimizer updates in the whole run."""

    extra_steps: int = _free(0)
    """Updates after max_steps, with what the schedules have come to: to go on with a run that is done."""

    global_batch: int = 32
    """Sequences per update, over all processes; a multiple of data_streams."""

    micro_batch: int = _free(4)
    """Sequences per forward on one process; smaller takes less memory, gradients are accumulated."""

    learning_rate: float = 3e-5
    """Peak learning rate of AdamW."""

    warmup: float = 0.05
    """Fraction of max_steps over which the learning rate rises linearly."""

    decay: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up; inverse_sqrt is sqrt(warm-up / step), as T5."""

    final_learning_rate: float = 0.1
    """Learning rate at the last update, as a share of the peak; of inverse_sqrt, the least."""

    weight_decay: float = 0.1
    """Weight decay of AdamW; never applied to norms, biases and other vectors."""

    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""

    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""

    clip_norm: float = 1.0
    """Gradients are scaled down to this norm over all parameters; 0 turns clipping off."""

    max_skipped: int = _free(10)
    """Updates whose loss or gradient is not finite are left out; so many in a row end the run."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 (with a scaled loss) compute in half precision and keep weights and optimizer in
    float32."""

    gradient_checkpointing: bool = _free(False)
    """Recompute activations in backward: less memory, about a third more time."""

    compile: bool = _free(False)
    """Train through torch.compile, which takes a minute or more at the start; not with
    gradient_checkpointing, nor sharded. Evaluation stays as it is."""

    skip_in_training: float = _free(0.0)
    """Share of active pairs of token and neuron up to which a block computes only these, in the backward pass
    as well (hf_sparse.skip_in_training); 0: never. For models that are very sparse already, on CPUs. Not with
    compile; methods that look at activations in every update, such as l1, have all computed, and so do the
    updates that are logged."""

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

    trackers: list[str] = field(default_factory=list, metadata={"free": True})
    """More places for the numbers of log.jsonl, of wandb and trackio; which must be installed."""

    progress: bool = _free(True)
    """Show a progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", _patch(self.patch))
        methods = self.acting_methods()
        object.__setattr__(self, "methods", {one.name: one.to_dict() for one in methods})
        if (lora := self.adapters()) is not None:
            object.__setattr__(self, "lora", asdict(lora))
        if (sharpness := self.perturbation()) is not None:
            object.__setattr__(self, "sharpness", sharpness.to_dict())
        if (mixed_in := self.mixed_in()) is not None:
            object.__setattr__(self, "mix_in", asdict(mixed_in))
        check_types(self)
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
            "max_skipped",
        ]:
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        for name in ("warmup", "final_learning_rate", "holdout", "skip_in_training"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "it must be a fraction, 0 to 1")
        at_least_0 = ("weight_decay", "clip_norm", "eval_every", "extra_steps", "seed")
        for name in (*at_least_0, "max_bad_documents", "data_workers"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "it must be at least 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "it must be in [0, 1)")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "it must be positive")
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "it must be at least 2")
        require(
            self.eval_tokens >= self.raw_length,
            "eval_tokens",
            self.eval_tokens,
            f"it must hold one text of {self.raw_length} tokens, of sequence_length={self.sequence_length}",
        )
        require(
            self.from_scratch or not self.model_config,
            "model_config",
            self.model_config,
            "a pretrained model has its size; it goes with from_scratch",
        )
        require(
            not (self.from_scratch and self.lora),
            "lora",
            self.lora,
            "with from_scratch the weights that it adapts would stay random",
        )
        require(
            self.global_batch % self.data_streams == 0,
            "global_batch",
            self.global_batch,
            f"each stream gives equally many, so it must be a multiple of data_streams={self.data_streams}",
        )
        require(
            self.extra_steps == 0
            or self.decay in ("constant", "inverse_sqrt")
            or self.final_learning_rate > 0,
            "extra_steps",
            self.extra_steps,
            f"with decay={self.decay!r} and final_learning_rate=0 there is nothing left to learn with",
        )
        samples = (self.sharpness or {}).get("samples", 0)
        require(
            samples <= self.global_batch,
            "sharpness.samples",
            samples,
            f"they are sequences of one batch, and global_batch={self.global_batch}",
        )
        require(
            not (self.compile and self.gradient_checkpointing),
            "compile",
            self.compile,
            "it does not go with gradient_checkpointing; choose one",
        )
        require(
            not (self.compile and self.skip_in_training),
            "skip_in_training",
            self.skip_in_training,
            "graphs of torch.compile compute every neuron; choose one",
        )
        require(
            self.patch != _DENSE or not self.skip_in_training,
            "skip_in_training",
            self.skip_in_training,
            "the dense baseline has no silent neurons; patch the model, or leave it at 0",
        )
        self._check_together(methods)
        for method in methods:
            method.check(self.sparsity_config())
        for name in self.trackers:
            require(name in TRACKERS, "trackers", name, f"choose from {', '.join(TRACKERS)}")

    @property
    def raw_length(self) -> int:
        """Tokens of text in a sequence."""
        spans = self.task == "span_corruption"
        return lengths(self.sequence_length).raw if spans else self.sequence_length

    def _check_together(self, methods: list[Method]) -> None:
        """Refuse what would train something else than it says."""
        named = {method.name for method in methods}
        teachers = ", ".join(method.name for method in methods if method.has_teacher)
        require(
            not (self.from_scratch and teachers),
            "from_scratch",
            True,
            f"there is no dense model to learn from; leave {teachers} out of methods",
        )
        require(
            self.from_scratch or "norm_clamp" not in named,
            "methods.norm_clamp",
            {},
            "it is for from_scratch, and would change a pretrained model at once; use norm_uplift",
        )
        lora, sparsity = self.adapters(), self.sparsity_config()
        if lora is not None:
            require(
                lora.biases or sparsity is None or "zeroth_bias" not in sparsity.parts,
                "lora.biases",
                False,
                "the zeroth biases of the patch would stay zero; set it to true",
            )
            require(
                lora.norms or "norm_uplift" not in named,
                "lora.norms",
                False,
                "norm_uplift changes norms that have to be trained meanwhile; set it to true",
            )

    @property
    def last_step(self) -> int:
        """The update after which the run is done."""
        return self.max_steps + self.extra_steps

    def acting_methods(self) -> list[Method]:
        """What acts during training, in its order."""
        return read_methods(self.methods)

    def adapters(self) -> Lora | None:
        """What ``lora`` says."""
        return None if self.lora is None else Lora.read(self.lora)

    def perturbation(self) -> SharpnessConfig | None:
        """What ``sharpness`` says."""
        return None if self.sharpness is None else read_sharpness(self.sharpness)

    def mixed_in(self) -> MixIn | None:
        """What ``mix_in`` says."""
        return None if self.mix_in is None else MixIn.read(self.mix_in)

    def sparsity_config(self) -> SparsityConfig | None:
        """What the model is patched with; None: it stays dense."""
        return None if self.patch == _DENSE else SparsityConfig.read(self.patch)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def changed(self, earlier: dict[str, Any]) -> list[str]:
        """Fields that make this another run than the one started with ``earlier``, as "name: then -> now"."""
        now = self.to_dict()
        steered = any(method.steered_by_evaluations for method in self.acting_methods())
        bound = {"eval_every"} if steered else set()
        fixed = [f.name for f in fields(self) if not f.metadata.get("free") or f.name in bound]
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
                f"activation.mix={config.activation.mix} is not for a recipe; the method mixing says "
                "until when the original activation is mixed out."
            )
    except ValueError as error:
        raise ValueError(f"patch: {error}") from None
    given = {k: v for k, v in config.to_dict().items() if k != "format_version" and v is not None}
    if given == {"activation": {"name": ORIGINAL}}:
        return _DENSE
    return config.activation.name if given == {"activation": {"name": config.activation.name}} else given


def _default(name: str) -> Any:
    return getattr(Recipe(), name)
