"""The embedded model and text: the model has learned, the text is sound, and both stay small."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import HELD_OUT_SHARE, python_corpus


@pytest.fixture(scope="module")
def corpus():
    return python_corpus()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()


def test_size():
    assert sum(f.stat().st_size for f in TINY_MODEL.glob("*.safetensors")) <= 4_000_000
    assert sum(f.stat().st_size for f in TINY_MODEL.iterdir()) <= 4_500_000


def test_it_is_a_llama_of_the_promised_kind(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 <= model.num_parameters() <= 2_000_000
    assert model.config.hidden_act == "silu"
    assert model.dtype == torch.float32  # though the weights are stored in half of that
    assert len(tokenizer) == model.config.vocab_size
    mlp = sum(sum(w.numel() for w, _ in block.weights()) for block in hf_sparse.inspect(model).blocks)
    assert mlp > model.num_parameters() / 2


@pytest.mark.slow
def test_it_has_learned(model, tokenizer, corpus):
    """Held-out loss is far below the unigram entropy, which is what knowing no order of words costs."""
    report = hf_sparse.measure(model, corpus.held_out, tokenizer=tokenizer, max_tokens=16_384)
    ids = [t for text in corpus.held_out for t in tokenizer(text, verbose=False)["input_ids"]]
    shares = torch.bincount(torch.tensor(ids)).double() / len(ids)
    entropy = torch.special.entr(shares).sum().item()
    assert 5.5 < entropy < 6.5
    assert report.loss < entropy - 2
    assert report.sparsity == 0


@pytest.mark.slow
def test_the_card_tells_the_truth(model, tokenizer, corpus):
    card = (TINY_MODEL / "README.md").read_text(encoding="utf-8")
    claimed = float(re.search(r"held-out loss \| \*\*([\d.]+)\*\*", card)[1])
    report = hf_sparse.measure(model, corpus.held_out, tokenizer=tokenizer)
    # Another Python has other text, and the card's windows are cut elsewhere.
    assert report.loss == pytest.approx(claimed, abs=0.25)
    assert "Python Software Foundation" in card


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["Return the", "The list of", "This module provides"])
def test_greedy_text_is_made_of_words(model, tokenizer, corpus, prompt):
    known = set(re.findall(r"[a-z]{2,}", " ".join(corpus.train).lower()))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    words = re.findall(r"[a-z]{2,}", tokenizer.decode(ids[0], skip_special_tokens=True).lower())[:-1]
    assert len(words) >= 12
    assert sum(word in known for word in words) >= 0.9 * len(words)
    assert len(set(words)) >= 6


@pytest.mark.parametrize("text", ["def f(x): return x", "naïve — “quoted”\n\ttabs", "日本語", "  spaces  "])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_corpus_splits_share_no_paragraph(corpus):
    def paragraphs(documents):
        return [" ".join(p.split()) for text in documents for p in re.split(r"\n\s*\n", text) if p.split()]

    train, held_out = paragraphs(corpus.train), paragraphs(corpus.held_out)
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    characters = sum(map(len, corpus.train))
    assert characters > 1_000_000
    assert characters * HELD_OUT_SHARE / 4 < sum(map(len, corpus.held_out)) < characters / 4


def test_corpus_does_not_depend_on_the_order_of_files_on_disk(tmp_path):
    names = [f"{name}.py" for name in ("b", "a", "d", "c", "e")]
    for folder, order in (("one", names), ("other", names[::-1])):
        (tmp_path / folder).mkdir()
        for name in order:
            (tmp_path / folder / name).write_text(f'"""{f"What {name} has to say. " * 9}"""\n')
    assert python_corpus(tmp_path / "one") == python_corpus(tmp_path / "other")


def test_corpus_from_other_sources(tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    words = "One paragraph of documentation that is long enough to be kept as a document of its own. "
    (tmp_path / "good.py").write_text(f'"""{words}"""\ndef f():\n    """F.\n\n    {words}"""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "pkg" / "test" / "hidden.py").write_text(f'"""Hidden: {words}"""\n')
    found = python_corpus(tmp_path)
    texts = [text for text in found.train + found.held_out if words.strip() in text]
    assert texts == [f"{words.strip()}\n\nF."]  # the repeated paragraph is there once
    assert not any("Hidden" in text for text in found.train + found.held_out)


@pytest.mark.slow
def test_corpus_on_disk(corpus, tmp_path):
    folder = corpus.write(tmp_path / "text")
    for name, documents in (("train", corpus.train), ("validation", corpus.held_out)):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert tuple(json.loads(line)["text"] for line in lines) == documents
