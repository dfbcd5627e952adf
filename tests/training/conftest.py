"""A tiny Llama, a tokenizer trained on the spot, text, and ways to run finetune.py as users do."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = ROOT / "training" / "finetune.py"
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


def sentences(count: int, seed: int) -> list[str]:
    """Documents of different lengths, no two alike."""
    rng = random.Random(seed)
    words = ["the", "cat", "dog", "tree", "river", "runs", "sleeps", "sees", "under", "green", "because"]
    return [f"{seed}-{i} {' '.join(rng.choices(words, k=rng.randint(3, 60)))}" for i in range(count)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": t, "url": f"u{i}"}) + "\n" for i, t in enumerate(texts))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
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
                options += [f"--{name}", str(value)]
        if processes == 1:
            return [sys.executable, str(FINETUNE), *options]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        launcher += ["--num_machines", "1", "--num_processes", str(processes), "--mixed_precision", "no"]
        launcher += ["--dynamo_backend", "no", "--main_process_port", str(port)]
        return [*launcher, str(FINETUNE), *options]

    return build


def environment() -> dict[str, str]:
    """One thread and no network, on the CPU."""
    extra = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **extra, "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str], *, ok: bool = True) -> str:
    """Run to the end; gives what it printed."""
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def helpers() -> object:
    """This file's helpers, for tests: pytest's importlib mode lets them import no sibling."""
    return sys.modules[__name__]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Runs a command line from ``command`` in this process: as good, and without the start of a Python."""
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(line: list[str]) -> None:
        import finetune

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        finetune.main(line[2:])

    return call
