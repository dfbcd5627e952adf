"""Every way of generating, of caching and of attending, with a model that skips: what dense ReLU gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache, pipeline, set_seed
from transformers.cache_utils import DynamicCache

import hf_sparse
from support.peek import layouts
from support.skips import CountSkips
from support.twins import IDS, KINDS, assert_close, logits, tokenizer, twins

SMALL = {"num_hidden_layers": 1}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "sampling beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "a prompt in chunks": {"prefill_chunk_size": 4},
    "guidance": {"guidance_scale": 1.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


def generate(model: PreTrainedModel, backend: str, ids: Tensor = IDS[:, :6], **options: Any) -> Any:
    """Tokens and the logits that they were chosen by."""
    set_seed(3)
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    with hf_sparse.backend(backend):
        return model.generate(ids, output_logits=True, return_dict_in_generate=True, **given)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating(kind, way) -> None:
    model, reference = twins(kind)
    expected = generate(reference, "dense", **WAYS[way])
    with CountSkips() as skips:
        assert_same(generate(model, "torch", **WAYS[way]), expected)
    assert skips.count >= 8 * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("helper", ["a model", "the prompt"])
def test_assisted_generation(kind, helper) -> None:
    """Both models are patched; drafts are verified several tokens at a time."""
    model, reference = twins(kind)
    drafts = twins(kind, seed=0, **SMALL)
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    expected = generate(reference, "dense", prompt)
    found = []
    for one, draft, backend in ((model, drafts[0], "torch"), (reference, drafts[1], "dense")):
        options = {"assistant_model": draft} if helper == "a model" else {"prompt_lookup_num_tokens": 3}
        with CountSkips() as skips:
            found.append(generate(one, backend, prompt, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(found[0].sequences, expected.sequences)
    with CountSkips() as skips:
        generate(model, "torch", prompt, **options)
    assert skips.count > 0


def contrastive(model: PreTrainedModel, input_ids: Tensor, generation_config: Any, **_: Any) -> Tensor:
    """Contrastive search (Su et al., 2022) for one sequence; transformers has it as a function of the user's.

    Of the most likely tokens, the one whose hidden state is least like an earlier one.
    """
    k, alpha = 4, 0.6
    with torch.no_grad():
        for _ in range(generation_config.max_new_tokens):
            probabilities, tokens = model(input_ids, use_cache=False).logits[0, -1].softmax(-1).topk(k)
            candidates = torch.cat([input_ids.expand(k, -1), tokens[:, None]], dim=1)
            hidden = model(candidates, use_cache=False, output_hidden_states=True).hidden_states[-1]
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
            likeness = (hidden[:, :-1] @ hidden[:, -1:].mT).amax(dim=(1, 2))
            best = ((1 - alpha) * probabilities - alpha * likeness).argmax()
            input_ids = candidates[best : best + 1]
    return input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_contrastive_search(kind) -> None:
    model, reference = twins(kind)
    tokens = []
    for one, backend in ((reference, "dense"), (model, "torch")):
        with hf_sparse.backend(backend), CountSkips() as skips:
            tokens.append(one.generate(IDS[:1, :5], max_new_tokens=6, custom_generate=contrastive))
    assert torch.equal(*tokens)
    assert tokens[0].shape == (1, 11)
    assert skips.count == 2 * 6 * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation_with_left_padding(kind, attention) -> None:
    """Rows of different lengths, which give what each gives alone."""
    model, reference = twins(kind, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    mask = torch.ones_like(IDS[:, :6])
    mask[1, :3] = 0
    ids = IDS[:, :6].masked_fill(mask == 0, model.config.pad_token_id)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4}
    expected = generate(reference, "dense", ids, **options)
    with CountSkips() as skips:
        found = generate(model, "torch", ids, **options)
    assert skips.count == 4 * 2
    assert_same(found, expected)
    alone = generate(model, "torch", ids[1:, 3:], max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(alone.sequences[0], found.sequences[1, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention(kind) -> None:
    """Not compiled here, which takes long. What was skipped is read off the layout: no mode sees into it."""
    model, reference = twins(kind, attn_implementation="flex_attention")
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with torch.compiler.set_stance("force_eager"):
        expected = logits(reference, attention_mask=mask)
        assert_close(logits(model, "torch", attention_mask=mask), expected)
    assert layouts(model) == {True}


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_can_be_changed_after_the_patch(kind) -> None:
    model, _ = twins(kind)
    expected = logits(model)
    model.set_attn_implementation("eager")
    with CountSkips() as skips:
        assert_close(logits(model, "torch"), expected)
    assert skips.count == 2
    assert len(hf_sparse.inspect(model).blocks) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_given_by_hand_and_cropped(kind, cache) -> None:
    """Token by token over a cache is the whole text at once, also after going back a step."""
    model, reference = twins(kind)
    expected = logits(reference, ids=IDS[:1, :9])
    past: Any = DynamicCache(config=model.config)
    if cache == "static":
        past = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad(), hf_sparse.backend("torch"), CountSkips() as skips:
        found = [model(IDS[:1, :5], past_key_values=past).logits]
        if cache == "dynamic":
            model(IDS[1:, 5:7], past_key_values=past)  # a draft that is given up
            past.crop(-2)
        for i in range(5, 9):
            found.append(model(IDS[:1, i : i + 1], past_key_values=past).logits)
    assert_close(torch.cat(found, dim=1), expected)
    assert skips.count >= 5 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_of_a_saved_model(kind, tmp_path) -> None:
    """From a folder, in batches of texts of different lengths."""
    model, reference = twins(kind)
    for one, name in ((model, "sparse"), (reference, "by hand")):
        one.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    texts = ["w5 w6 w7", "w20 w21", "w9"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2}
    expected = pipeline("text-generation", model=reference, tokenizer=tokenizer())(texts, **options)
    pipe = pipeline("text-generation", model=str(tmp_path / "sparse"))
    assert len(hf_sparse.inspect(pipe.model).blocks) == 2
    with hf_sparse.backend("torch"), CountSkips() as skips:
        assert pipe(texts, **options) == expected
    assert skips.count > 0


def test_pipelines_of_an_encoder(tmp_path) -> None:
    """BERT fills a mask, and gives features, with another class for each."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=128)).eval()
    words = tokenizer()
    words.add_special_tokens({"mask_token": "w4"})
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    for task, text in (("fill-mask", "w5 w4 w7"), ("feature-extraction", "w5 w6 w7")):
        pipe = pipeline(task, model=str(tmp_path))
        found = []
        for backend in ("dense", "torch"):
            with hf_sparse.backend(backend), CountSkips() as skips:
                found.append(pipe(text))
        assert skips.count == 2
        if task == "fill-mask":
            assert [one["token"] for one in found[0]] == [one["token"] for one in found[1]]
        else:
            assert_close(torch.tensor(found[0]), torch.tensor(found[1]))
    assert copy.deepcopy(pipe.model).config.hf_sparse
