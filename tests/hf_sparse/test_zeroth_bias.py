"""Zeroth biases: the row of a token's position, wherever that is said, is added in each block."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.adapters import find_blocks
from support.models import tiny, untrained_llama
from support.peek import zeroth_biases
from support.skips import CountSkips
from support.twins import assert_close
from support.zeroth import POSITIONS, biased, gradients, left_padded, logits

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma", "phi3")


@pytest.mark.parametrize("placement", ["input", "output"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_what_hooks_on_the_stock_blocks_add(kind, placement, input_ids) -> None:
    model = biased(kind, placement=placement)
    by_hand = copy.deepcopy(model)
    hf_sparse.unpatch(by_hand)
    hf_sparse.patch(by_hand, "relu")
    for block, table in zip(find_blocks(by_hand)[0], zeroth_biases(model), strict=True):
        rows = table[: input_ids.shape[1]]
        if placement == "input":
            block.module.register_forward_pre_hook(lambda _, args, rows=rows: (args[0] + rows,))
        else:
            block.module.register_forward_hook(lambda _, __, output, rows=rows: output + rows)
    expected = logits(by_hand, input_ids)
    assert torch.equal(logits(model, input_ids), expected)
    hf_sparse.unpatch(by_hand)
    assert not torch.allclose(logits(by_hand, input_ids), expected, atol=0.1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_new_one_changes_nothing(kind, input_ids) -> None:
    torch.manual_seed(0)
    model = tiny(kind)
    stock = logits(model, input_ids)
    report = hf_sparse.patch(model, {"activation": "original", "zeroth_bias": {}})
    assert torch.equal(logits(model, input_ids), stock)
    assert report.config.parts["zeroth_bias"].positions == 64, "all that the model has"
    assert [table.shape for table in zeroth_biases(model)] == [(64, 32)] * 3
    assert report.stock_name is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unpatch_gives_the_stock_model_back(kind, input_ids) -> None:
    model = tiny(kind)
    before, expected = repr(model), logits(model, input_ids)
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    config = copy.deepcopy(model.config.to_dict())
    hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {}})
    hf_sparse.unpatch(model)
    assert repr(model) == before
    assert hooks == [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, input_ids), expected)


def test_patching_again_keeps_what_was_trained(input_ids) -> None:
    model = biased()
    expected = logits(model, input_ids)
    hf_sparse.patch(model, {"activation": "jsrelu", "zeroth_bias": {"positions": POSITIONS}})
    assert not torch.equal(logits(model, input_ids), expected)
    hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {"positions": POSITIONS}})
    assert torch.equal(logits(model, input_ids), expected)
    hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {"positions": 7}})
    assert not any(table.any() for table in zeroth_biases(model))


# ---- which position


@pytest.mark.parametrize(
    ("kind", "placement", "cache"),
    [("llama", "input", None), ("llama", "output", "static"), ("gpt2", "input", "static")],
)
def test_decoding_with_a_cache_is_the_forward_without(kind, placement, cache) -> None:
    model = biased(kind, placement=placement)
    ids, mask = left_padded(torch.randint(3, 128, (2, 9)), 2)
    mask[0] = 1  # one of both is padded
    done = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        cache_implementation=cache,
        disable_compile=True,
    )
    mask = torch.cat((mask, mask.new_ones(2, 8)), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, done.sequences, attention_mask=mask, position_ids=positions)
    assert_close(torch.stack(done.logits, dim=1), whole[:, -9:-1])


def test_beams_are_scored_as_without_a_cache() -> None:
    model = biased()
    done = model.generate(
        torch.randint(3, 128, (2, 9)),
        max_new_tokens=6,
        num_beams=3,
        num_return_sequences=3,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found = logits(model, done.sequences)[:, 8:-1].log_softmax(-1)
    scores = found.gather(-1, done.sequences[:, 9:, None]).sum((1, 2)) / 6
    assert_close(done.sequences_scores, scores)


def test_padding_before_a_text_moves_nothing(input_ids) -> None:
    model = biased()
    padded, mask = left_padded(input_ids, 3)
    assert_close(logits(model, padded, attention_mask=mask)[:, 3:], logits(model, input_ids))
    padded, mask = padded.roll(-3, 1), mask.roll(-3, 1)
    assert_close(logits(model, padded, attention_mask=mask)[:, :-3], logits(model, input_ids))


def test_packed_texts_each_begin_at_0() -> None:
    model = biased()
    one, other = torch.randint(3, 128, (1, 7)), torch.randint(3, 128, (1, 9))
    positions = torch.cat((torch.arange(7), torch.arange(9)))[None]
    packed = logits(model, torch.cat((one, other), dim=1), position_ids=positions, use_cache=False)
    assert_close(packed, torch.cat((logits(model, one), logits(model, other)), dim=1))


def test_tokens_beyond_the_table_get_no_bias(input_ids) -> None:
    model, longer = biased(positions=5), biased(positions=17)
    with torch.no_grad():
        for short, long in zip(zeroth_biases(model), zeroth_biases(longer), strict=True):
            long.zero_()[:5] = short
    assert torch.equal(logits(model, input_ids), logits(longer, input_ids))
    assert model.generate(input_ids, max_new_tokens=4, pad_token_id=0, eos_token_id=None).shape == (2, 21)


def test_embeddings_in_the_place_of_tokens_are_counted(input_ids) -> None:
    model = biased()
    embedded = model.get_input_embeddings()(input_ids)
    assert torch.equal(logits(model, None, inputs_embeds=embedded), logits(model, input_ids))


def test_what_does_not_say_where_tokens_stand_is_refused(input_ids) -> None:
    model = biased()
    with pytest.raises(ValueError, match=r"position_ids of shape \(3, 2, 17\)"):
        logits(model, input_ids, position_ids=torch.arange(17).expand(3, 2, 17))
    with pytest.raises(ValueError, match=r"attention_mask=<\(2, 1, 17, 17\)> does not say"):
        logits(model, input_ids, attention_mask=torch.ones(2, 1, 17, 17, dtype=torch.bool))
    with torch.no_grad():
        past = model(input_ids[:, :9]).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 8 columns for 9 tokens in the cache and 8 new"):
        logits(model, input_ids[:, 9:], past_key_values=past, attention_mask=torch.ones(2, 8))
    with pytest.raises(RuntimeError, match="outside of the forward of its model"):
        model.model.layers[0].mlp(torch.randn(1, 3, 32))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: (args[0][:, :3],))
    with pytest.raises(RuntimeError, match="not all of the 2 x 17 tokens"):
        logits(model, input_ids)


def test_threads_do_not_mix_their_positions(input_ids) -> None:
    model = biased()
    batches = [left_padded(input_ids[:, : 5 + 3 * i], i) for i in range(4)]
    expected = [logits(model, ids, attention_mask=mask) for ids, mask in batches]
    found: list[list[Tensor]] = [[] for _ in batches]

    def run(i: int) -> None:
        ids, mask = batches[i]
        found[i] = [logits(model, ids, attention_mask=mask) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, many in zip(expected, found, strict=True):
        assert len(many) == 20
        for other in many:
            assert_close(other, one)


# ---- training


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("reentrant", "thread"), [(False, False), (True, False), (False, True)])
def test_a_recomputed_layer_gets_the_positions_of_its_forward(kind, reentrant, thread, input_ids) -> None:
    model = biased(kind, activation="jsrelu")
    batches = []
    for by in (0, 4):  # two forwards that wait for their backward
        ids, mask = left_padded(input_ids, by)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    expected = gradients(model, batches)
    assert all(grad is not None and grad.any() for grad in expected[-3:])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    for found, want in zip(gradients(model, batches, thread=thread), expected, strict=True):
        assert_close(found, want)


def test_only_rows_that_are_used_are_trained(input_ids) -> None:
    model = biased().train()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    for table in zeroth_biases(model):
        assert (table.grad[:16].abs().sum(1) > 0).all()
        assert not table.grad[16:].any(), "the last token predicts nothing"


# ---- skipping, other tools


@pytest.mark.parametrize(("kind", "placement"), [("llama", "input"), ("gpt2", "output"), ("phi3", "input")])
def test_skipping_computes_the_same(kind, placement, input_ids) -> None:
    model = biased(kind, placement=placement)
    with hf_sparse.backend("dense"):
        expected = logits(model, input_ids)
    with hf_sparse.backend("torch"), CountSkips() as skips:
        found = logits(model, input_ids)
    assert skips.count == 3
    assert_close(found, expected)
    hf_sparse.prepare(model, certify=True)
    assert_close(logits(model, input_ids[:1, :1]), expected[:1, :1])


@pytest.mark.parametrize("placement", ["input", "output"])
def test_what_is_watched_is_what_the_projections_get(placement, input_ids) -> None:
    model = biased(placement=placement)
    block = find_blocks(model)[0][1]
    seen: dict[str, Tensor] = {}
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _, __, output: seen.update(norm=output))
    block.watch("x", lambda x, _: seen.update(x=x))
    block.watch("p", lambda p, _: seen.update(p=p))
    logits(model, input_ids)
    rows = block.module.zeroth_bias.bias[:17] if placement == "input" else 0.0
    assert torch.equal(seen["x"], seen["norm"] + rows)
    assert torch.equal(seen["p"], block.module.gate_proj(seen["x"]))


@pytest.mark.parametrize("how", [{"modules_to_save": ["zeroth_bias"]}, {"bias": "all"}])
def test_peft_trains_saves_and_merges_them(how, input_ids, tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = biased()
    stock = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"], **how))
    assert_close(logits(adapted, input_ids), logits(stock, input_ids))
    trained = [p for p in zeroth_biases(adapted) if p.requires_grad]
    assert len(trained) == 3
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    after = logits(adapted.eval(), input_ids)
    assert all(not torch.equal(one, other) for one, other in zip(trained, zeroth_biases(stock), strict=True))
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(stock, tmp_path), input_ids), after)
    merged = adapted.merge_and_unload()
    assert_close(logits(merged, input_ids), after)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), input_ids), after)


def test_copies_and_pickles_of_a_model_go_on(input_ids, tmp_path) -> None:
    model = biased()
    padded, mask = left_padded(input_ids, 3)
    expected = logits(model, padded, attention_mask=mask)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        nn.init.zeros_(zeroth_biases(model)[0])
        assert torch.equal(logits(other, padded, attention_mask=mask), expected)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "model", "model.layers.0"])
def test_compiled_graphs_hold_them(part, input_ids) -> None:
    model = biased("llama", "jsrelu", num_hidden_layers=1)
    padded, mask = left_padded(input_ids, 3)
    expected = logits(model, padded, attention_mask=mask)
    model.get_submodule(part).compile(backend="eager", fullgraph=True)
    assert_close(logits(model, padded, attention_mask=mask), expected)


# ---- what cannot have one


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mixtral", r"given those that are routed to it; leave zeroth_bias out, or these blocks"),
        ("opt", r"stays a OPTDecoderLayer when it is patched; leave zeroth_bias out"),
        ("xlstm", r"the forward of xLSTMModel is given none"),
    ],
)
def test_a_model_that_cannot_have_them_is_left_as_it_was(kind, why) -> None:
    model = tiny(kind, **({"num_heads": 4, "qk_dim_factor": 0.5} if kind == "xlstm" else {}))
    before = repr(model), model.config.to_dict()
    with pytest.raises(hf_sparse.PatchError, match=why):
        hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {"positions": 8}})
    assert (repr(model), model.config.to_dict()) == before


def test_tables_larger_than_the_model_have_to_be_asked_for() -> None:
    model = tiny("llama", max_position_embeddings=4096)
    with pytest.raises(
        hf_sparse.PatchError, match=r"4096 positions .* 393,216 parameters, more than .*positions=512"
    ):
        hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {}})
    hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {"positions": 4096}})
    assert zeroth_biases(model)[0].shape == (4096, 32)


@pytest.mark.parametrize(
    "value",
    [
        *({"placement": one} for one in ("Input", "", None, [], {}, 1, "x" * 10**6)),
        *({"positions": one} for one in (0, -1, True, 1.0, "8", [8], 2**21, 10**400, float("nan"))),
        {"clip": 0.1},
        {"positions": 8, "\ud800": 1},
        "input",
        8,
        [],
    ],
)
def test_what_a_config_may_not_say(value) -> None:
    with pytest.raises(ValueError, match="zeroth_bias") as error:
        hf_sparse.SparsityConfig(zeroth_bias=value)
    assert len(str(error.value)) < 400


def test_blocks_that_no_longer_agree_are_not_saved(tmp_path) -> None:
    model = biased()
    del model.model.layers[1].mlp.zeroth_bias
    with pytest.raises(hf_sparse.PatchError, match=r"zeroth_bias, but model\.layers\.1\.mlp has none"):
        model.save_pretrained(tmp_path)
    other = biased(positions=8)
    model = biased()
    model.model.layers[1].mlp.zeroth_bias = other.model.layers[1].mlp.zeroth_bias
    with pytest.raises(hf_sparse.PatchError, match="the zeroth biases of the patched blocks differ"):
        model.save_pretrained(tmp_path)


def test_parameters_are_made_like_those_of_the_block() -> None:
    model = tiny("llama").to(torch.bfloat16)
    hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {"positions": 8}})
    assert {table.dtype for table in zeroth_biases(model)} == {torch.bfloat16}
    with torch.device("meta"):
        built = type(model)(model.config)
    assert {table.device.type for table in zeroth_biases(built)} == {"meta"}


def test_a_patch_that_drops_what_was_trained_says_so():
    model = untrained_llama()
    hf_sparse.patch(model, SparsityConfig(zeroth_bias={"positions": 8}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # zeros are nothing to lose
        hf_sparse.patch(model, SparsityConfig(zeroth_bias={"positions": 4}))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "zeroth_bias" in name).fill_(0.1)
    with pytest.warns(UserWarning, match=r"drops what was trained as model\.layers\.0\.mlp\.zeroth_bias"):
        hf_sparse.patch(model, SparsityConfig(zeroth_bias={"positions": 6}))
