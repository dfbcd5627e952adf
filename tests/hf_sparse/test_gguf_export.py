"""GGUF files: llama.cpp computes what transformers does, from the same tokens; else there is no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.cli import main
from hf_sparse.gguf_vocabulary import _LLAMA_3
from support.models import tiny

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}

# Family, its activation after the patch (None for no patch), and what its config has besides.
WRITTEN = {
    "llama": ("llama", None, {}),
    "llama, patched": ("llama", "original", {}),
    "llama, biases": ("llama", None, {"attention_bias": True, "mlp_bias": True}),
    "llama, tied and wide heads": ("llama", None, {"tie_word_embeddings": True, "head_dim": 16}),
    "llama, scaled": ("llama", None, {"rope_parameters": SCALED}),
    "llama, linearly scaled": ("llama", None, {"rope_parameters": LINEAR}),
    "llama, relu": ("llama", "relu", {}),
    "llama, relu, tied and wide heads": ("llama", "relu", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("mistral", None, {"sliding_window": None}),
    "mistral, relu": ("mistral", "relu", {"sliding_window": None}),
    "arcee": ("arcee", None, {"tie_word_embeddings": True}),
    "arcee, scaled": ("arcee", "relu2", {"rope_parameters": SCALED}),
    "nemotron": ("nemotron", None, {}),
    "nemotron, biases and tied": (
        "nemotron",
        "relu2",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
}

# What transformers reads of these files, too: not biases, scaled rotary frequencies, arcee or smallthinker.
READ_BACK = ("llama", "llama, patched", "llama, tied and wide heads", "mistral", "nemotron")


def made(family: str, activation: str | None, changes: dict[str, object], **fields: object):
    model = tiny(family, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which are 1 and 0
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    if activation is not None:
        hf_sparse.patch(model, activation, **fields)
    return model


class LlamaCpp:
    """A file in llama.cpp, everything in float32."""

    def __init__(self, path: Path) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        float32 = {"type_k": 0, "type_v": 0, "flash_attn": False}  # of the cache
        self._model = llama_cpp.Llama(
            str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, **float32
        )

    def logits(self, ids: list[int]) -> torch.Tensor:
        self._model.reset()
        self._model.eval(ids)
        return torch.tensor(self._model.scores[: len(ids)])

    def tokens(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), special=True)


@pytest.fixture
def needs_llama_cpp() -> None:
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package)


@pytest.mark.usefixtures("needs_llama_cpp")
@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_computes_the_same_logits(name, tmp_path, input_ids) -> None:
    model = made(*WRITTEN[name])
    with torch.no_grad(), hf_sparse.backend("torch"):  # a patched model is neuron-major from here on
        expected = model(input_ids[:1]).logits[0]
    path = hf_sparse.export(model, tmp_path / "model.gguf", format="gguf")
    torch.testing.assert_close(LlamaCpp(path).logits(input_ids[0].tolist()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", READ_BACK)
def test_transformers_reads_the_same_model_back(name, tmp_path, input_ids) -> None:
    pytest.importorskip("gguf")
    model = made(*WRITTEN[name])
    hf_sparse.export(model, tmp_path / "model.gguf", format="gguf")
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    torch.testing.assert_close(other(input_ids).logits, model(input_ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("needs_llama_cpp")
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_matrices_keep_their_dtype(dtype, kind, tmp_path, input_ids) -> None:
    from gguf import GGUFReader

    model = made("llama", "relu", {}).to(dtype)
    path = hf_sparse.export(model, tmp_path / "model.gguf", format="gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    rounded = model(input_ids[:1]).logits[0]
    exact = model.float()(input_ids[:1]).logits[0]
    error = (LlamaCpp(path).logits(input_ids[0].tolist()) - exact).abs().max()
    assert error <= 2 * (rounded - exact).abs().max()


@pytest.mark.usefixtures("needs_llama_cpp")
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_real_llama_and_its_vocabulary(activation, assets, tmp_path) -> None:
    folder = assets / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if activation:
        hf_sparse.patch(model, activation)
    path = hf_sparse.export(model, tmp_path / "model.gguf", format="gguf", tokenizer=tokenizer)
    other = LlamaCpp(path)
    for text in TEXTS:
        assert other.tokens(text) == tokenizer(text)["input_ids"]
    ids = tokenizer("Once upon a time, there was a little girl")["input_ids"]
    expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(other.logits(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("needs_llama_cpp")
def test_the_command(tmp_path, capsys) -> None:
    assert main(["patch", "tiny", "--output", str(tmp_path / "relu")]) == 0
    path = tmp_path / "relu.gguf"
    assert main(["export", str(tmp_path / "relu"), "--format", "gguf", "--output", str(path)]) == 0
    assert f"saved in {path}" in capsys.readouterr().out
    model, tokenizer = (
        cls.from_pretrained(tmp_path / "relu") for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer(TEXTS[0])["input_ids"]
    other = LlamaCpp(path)
    assert other.tokens(TEXTS[0]) == ids
    expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(other.logits(ids), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "another class": (lambda: made("qwen2", "original", {}), "not of Qwen2ForCausalLM"),
    "relu2": (
        lambda: made("llama", "relu2", {}),
        "with relu2: 'llama' computes silu, 'smallthinker' computes relu",
    ),
    "gelu": (lambda: made("llama", None, {"hidden_act": "gelu"}), "with gelu: 'llama' computes silu"),
    "relu": (lambda: made("nemotron", "relu", {}), "with relu: 'nemotron' computes relu2"),
    "mixed": (lambda: made("llama", "relu", {}, mix=0.5), "relu .mixed in at 0.5"),
    "layers": (lambda: made("llama", "relu", {}, layers=[0]), "relu in some of its layers"),
    "fatrelu": (lambda: made("llama", "fatrelu", {}, threshold=0.1), "fatrelu .threshold 0.1"),
    "cats": (lambda: made("llama", "cats_silu", {}, threshold=0.1), "with cats_silu .threshold 0.1"),
}
REFUSED_BESIDES = {
    "scaled": (
        lambda: made("llama", "relu", {"rope_parameters": SCALED}),
        "'smallthinker'.*no scaled rotary",
    ),
    "yarn": (
        lambda: made("llama", None, {"rope_parameters": {**LINEAR, "rope_type": "yarn"}}),
        "rope_type='yarn' cannot be written",
    ),
    "window": (lambda: made("mistral", None, {"sliding_window": 8}), "no sliding window; .* one of 8 tokens"),
    "bias": (lambda: made("llama", "relu", {"attention_bias": True}), "no bias in blk.0.attn_q"),
    "packed": (lambda: made("llama", None, {}).to(torch.float64), "is quantised, split, or not in memory"),
    "elsewhere": (lambda: made("llama", None, {}).to("meta"), "is quantised, split, or not in memory"),
}


@pytest.mark.parametrize("name", REFUSED | REFUSED_BESIDES)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, tmp_path) -> None:
    if name in REFUSED_BESIDES:
        pytest.importorskip("gguf")
    make, reason = (REFUSED | REFUSED_BESIDES)[name]
    with pytest.raises(hf_sparse.PatchError, match=reason):
        hf_sparse.export(make(), tmp_path / "model.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


# ---- vocabularies

TEXTS = (
    "Once upon a time, there was 1 little girl; she'll say: it's 12345 o'clock!",
    "def f(x):\n\treturn  x + 1   # don't\r\n\r\n\n    pass",
    "ünï¢ode, 漢字 and 🙂🙂, e\u0301 \u00a0 end ",
    "THE LIST'S Names; a<end>b",
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_level(cut: pre_tokenizers.PreTokenizer, *, whole: bool) -> PreTrainedTokenizerFast:
    """Trained on the sources of some modules, with a token that merges do not make."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<s>", "<end>"])
    tokenizer.train_from_iterator([Path(__file__).read_text(), *TEXTS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", unk_token="<end>"
    )


def exported(tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaCpp:
    # The model is larger than its vocabulary, as many are.
    model = tiny("llama", vocab_size=len(tokenizer) + 3)
    return LlamaCpp(hf_sparse.export(model, folder / "model.gguf", format="gguf", tokenizer=tokenizer))


@pytest.mark.usefixtures("needs_llama_cpp")
@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_vocabularies_give_the_same_tokens(cut, tmp_path) -> None:
    tokenizer = byte_level(CUTS[cut], whole=cut == "llama-bpe")
    other = exported(tokenizer, tmp_path)
    for text in TEXTS:
        assert other.tokens(text) == tokenizer(text)["input_ids"]


@pytest.mark.usefixtures("needs_llama_cpp")
def test_a_vocabulary_as_transformers_makes_it_from_sentencepiece(assets, tmp_path) -> None:
    model = json.loads((assets / "stories260K/tokenizer.json").read_text())["model"]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    with pytest.warns(UserWarning, match="one space more"):
        other = exported(tokenizer, tmp_path)
    for text in TEXTS[:2]:
        assert other.tokens(text) == tokenizer(text)["input_ids"]


def unknown_cut() -> PreTrainedTokenizerFast:
    return byte_level(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), GPT2]), whole=False)


def word_level() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def without_a_merge() -> PreTrainedTokenizerFast:
    texts = ("<unk>", "<s>", "</s>", "a", "b", "ab")
    return LlamaTokenizer(vocab={text: number for number, text in enumerate(texts)}, merges=[])


@pytest.mark.filterwarnings("ignore:where a text begins")
@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (unknown_cut, "the pre-tokenizer .*Punctuation"),
        (lambda: byte_level(GPT2, whole=True), "ignore_merges=True"),
        (word_level, "a model of the type WordLevel"),
        (without_a_merge, "merges that are not those of a SentencePiece model"),
        (lambda: AutoTokenizer.from_pretrained(TINY_MODEL), "1536 tokens, where the model has 700"),
        (lambda: "llama", "str, which is not a fast tokenizer"),
    ],
)
def test_vocabularies_that_may_give_other_tokens_are_refused(tokenizer, reason, tmp_path) -> None:
    pytest.importorskip("gguf")
    model, path = tiny("llama", vocab_size=700), tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=reason):
        hf_sparse.export(model, path, format="gguf", tokenizer=tokenizer())
    assert list(tmp_path.iterdir()) == []
