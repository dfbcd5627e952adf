"""A tiny Llama, a tokenizer trained on the spot, text, and the command lines of short runs on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from support.models import tiny_t5 as saved_t5
from support.models import untrained_llama
from support.runs import TRAINING, sentences, write_jsonl

FINETUNE = TRAINING / "finetune.py"
SHORT = {
    "sequence_length": 16,
    "global_batch": 8,
    "micro_batch": 8,
    "max_steps": 12,
    "learning_rate": 3e-3,
    "eval_tokens": 320,
    "eval_every": 6,
    "save_every": 4,
    "log_every": 2,
    "shuffle_buffer": 5,
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two training shards and a validation shard, as C4 lays them out."""
    folder = tmp_path_factory.mktemp("texts")
    write_jsonl(folder / "c4-train.00000-of-00002.json.gz", sentences(260, 0))
    write_jsonl(folder / "c4-train.00001-of-00002.json.gz", sentences(240, 1))
    write_jsonl(folder / "c4-validation.00000-of-00001.json.gz", sentences(60, 2))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Llama of about 20,000 parameters with its own tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tiny")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"])
    trained.train_from_iterator(sentences(200, 0), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = untrained_llama(
        vocab_size=len(tokenizer), intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=True
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of about 30,000 parameters with its own tokenizer, which has 20 sentinels, saved."""
    folder = tmp_path_factory.mktemp("tiny_t5")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    sentinels = [f"<extra_id_{i}>" for i in range(20)]
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<pad>", "</s>", "<unk>", *sentinels])
    trained.train_from_iterator(sentences(200, 0), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=sentinels,
    )
    tokenizer.save_pretrained(folder)
    tiny_model = saved_t5(vocab_size=len(tokenizer), d_ff=48, eos_token_id=1, dropout_rate=0.1)
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="session")
def command(tiny: Path, texts: Path) -> Callable[..., list[str]]:
    """The command line of a short run on the tiny model; a keyword overrides a field, True is a flag."""

    def build(output: Path, *, processes: int = 1, port: int = 0, **fields: object) -> list[str]:
        values = {"model": tiny, "dataset": texts, "output_dir": output, **SHORT, **fields}
        options = ["--no-progress", "--no-tensorboard"]
        for name, value in values.items():
            if value is True:
                options.append(f"--{name}")
            elif isinstance(value, list):
                options += [f"--{name}", *map(str, value)]
            else:
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                options += [f"--{name}", text]
        if processes == 1:
            return [sys.executable, str(FINETUNE), *options]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        launcher += ["--num_machines", "1", "--num_processes", str(processes), "--mixed_precision", "no"]
        launcher += ["--dynamo_backend", "no", "--main_process_port", str(port)]
        return [*launcher, str(FINETUNE), *options]

    return build


@pytest.fixture(scope="session")
def in_process() -> Callable[[list[str]], None]:
    """Runs a command line from ``command`` in this process: as good, and without the start of a Python."""
    from accelerate.state import AcceleratorState, PartialState

    def call(line: list[str]) -> None:
        import finetune

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            finetune.main(line[2:])

    return call
