"""prepare(greedy_output=True): the same tokens of greedy decoding, and all logits for everybody else."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaModel,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

import hf_sparse
import triton_ops
from hf_sparse import PatchError
from hf_sparse.modules import OutputLayer
from support.compiler import needs_compiler

pytestmark = needs_compiler
IDS = torch.tensor([[5, 9, 7], [3, 4, 6]])
LONG = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
ALL_STEPS = (38, 39)
"""Of 40: the first that transformers calls as a decoding step, which is the prompt's or not, computes all."""


@pytest.fixture
def left_out(monkeypatch) -> list[int]:
    """How many logits each product of an output layer has left out; no layer is too small for the kernel."""
    found: list[int] = []
    product = triton_ops.greedy_linear

    def greedy_linear(*args: Tensor) -> Tensor:
        y = product(*args)
        found.append(int((y == -torch.inf).sum()))
        return y

    monkeypatch.setattr(triton_ops, "greedy_linear", greedy_linear)
    with hf_sparse.backend("cpp"):
        yield found


def prepared(model: PreTrainedModel, **options: bool) -> PreTrainedModel:
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, greedy_output=True, **options)
    return model


def plainly(model: PreTrainedModel, ids: Tensor = IDS, **options: object) -> Tensor:
    """What it generates when all logits are computed."""
    other = copy.deepcopy(model)
    hf_sparse.prepare(other)
    return other.generate(ids, **{**LONG, **options})


@pytest.fixture
def real(assets) -> PreTrainedModel:
    return prepared(AutoModelForCausalLM.from_pretrained(assets / "stories260K").eval())


@pytest.fixture
def llama(tiny_model) -> PreTrainedModel:
    return prepared(tiny_model("llama"))


@pytest.mark.parametrize("ids", [IDS, IDS[:1], torch.randint(3, 500, (4, 20))], ids=["2", "1", "4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokens_of_a_real_llama_are_the_same(real, left_out, dtype, ids) -> None:
    real.to(dtype)
    assert torch.equal(real.generate(ids, **LONG), plainly(real, ids))
    assert len(left_out) in ALL_STEPS
    assert sum(left_out) > 0.9 * min(ALL_STEPS) * len(ids) * real.config.vocab_size


def test_certificates_of_mlps_go_with_it(assets, left_out) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K").eval()
    prepared(model, certify=True)
    assert torch.equal(model.generate(IDS, **LONG), plainly(model))
    assert len(left_out) in ALL_STEPS


def test_any_type_generates_the_same(layered_type, tiny_model, left_out) -> None:
    """Also those that do something to their logits after the output layer: they compute all."""
    model = tiny_model(layered_type)
    expected = plainly(prepared(model))
    assert torch.equal(model.generate(IDS, **LONG), expected)
    capped = bool(getattr(model.config, "final_logit_softcapping", None))
    assert len(left_out) in ([0] if capped else ALL_STEPS)


@pytest.mark.parametrize(
    ("model", "config", "scale"),
    [
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.5}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    ],
)
def test_logits_that_are_scaled_are_all_computed(left_out, model, config, scale) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    made = prepared(model(config(**sizes, **heads, **scale, pad_token_id=0)).eval())
    assert torch.equal(made.generate(IDS, **LONG), plainly(made))
    assert left_out == []


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_beams": 2},
        {"repetition_penalty": 1.2},
        {"return_dict_in_generate": True, "output_logits": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 2},
        {"max_new_tokens": 20},
        {"cache_implementation": "static"},
        {"logits_processor": [lambda ids, scores: scores.flip(-1)]},
    ],
    ids=lambda options: "-".join(options),
)
def test_who_looks_at_more_gets_all(llama, left_out, options) -> None:
    ids = IDS[:1]
    torch.manual_seed(0)
    found = llama.generate(ids, **{**LONG, **options})
    torch.manual_seed(0)
    expected = plainly(llama, ids, **options)
    for name in ("logits", "scores"):
        if isinstance(found, dict) and name in found:
            assert all(map(torch.equal, found[name], expected[name]))
            found, expected = found["sequences"], expected["sequences"]
    assert torch.equal(found, expected)
    assert len(left_out) in (ALL_STEPS if "cache_implementation" in options else [0])


def test_an_assistant_gets_all(llama, tiny_model, left_out) -> None:
    ids, assistant = IDS[:1], tiny_model("llama")
    assert torch.equal(llama.generate(ids, assistant_model=assistant, **LONG), plainly(llama, ids))
    assert left_out == []


class Asking(BaseStreamer):
    """Calls the model while it generates."""

    def __init__(self, ask: Callable[[], Tensor]) -> None:
        self.ask, self.found = ask, []

    def put(self, value: Tensor) -> None:
        self.found.append(self.ask())

    def end(self) -> None: ...


def test_other_calls_meanwhile_get_all(llama, left_out) -> None:
    ids = IDS[:1]
    expected = plainly(llama, ids)
    streamer = Asking(lambda: llama(IDS[:, :1]).logits)
    assert torch.equal(llama.generate(ids, streamer=streamer, **LONG), expected)
    assert len(left_out) in ALL_STEPS
    assert len(streamer.found) > 39
    assert all(logits.isfinite().all() for logits in streamer.found)


def test_calls_of_another_thread_get_all(llama, left_out) -> None:
    found, done = [], threading.Event()

    def ask() -> None:
        with torch.no_grad(), hf_sparse.backend("cpp"):
            while not done.is_set():
                found.append(bool(llama(IDS[:, :1]).logits.isfinite().all()))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        tokens = llama.generate(IDS, **LONG)
    finally:
        done.set()
        thread.join()
    assert torch.equal(tokens, plainly(llama))
    assert left_out
    assert found
    assert all(found)


@pytest.mark.parametrize("where", ["model", "layer", "everywhere"])
def test_hooks_see_all(llama, left_out, where) -> None:
    seen: list[Tensor] = []

    def hook(module: torch.nn.Module, args: object, output: object) -> None:
        if module in (llama, llama.lm_head):
            seen.append(output if isinstance(output, Tensor) else output.logits)

    if where == "everywhere":
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = (llama if where == "model" else llama.lm_head).register_forward_hook(hook)
    try:
        tokens = llama.generate(IDS, **LONG)
    finally:
        handle.remove()
    assert len(seen) >= 40
    assert all(logits.isfinite().all() for logits in seen)
    assert torch.equal(tokens, plainly(llama))
    assert left_out == []
    llama.generate(IDS, **LONG)
    assert len(left_out) in ALL_STEPS


def test_a_forward_that_is_replaced_is_called(llama, left_out) -> None:
    original = type(llama).forward

    def forward(*args: object, **kwargs: object) -> object:
        outputs = original(llama, *args, **kwargs)
        outputs.logits = outputs.logits.flip(-1)
        return outputs

    llama.forward = forward
    tokens = llama.generate(IDS, **LONG)
    assert left_out == []
    del llama.forward
    assert not torch.equal(tokens, plainly(llama))


def test_a_class_that_begins_to_change_its_logits_is_an_error(llama, left_out, monkeypatch) -> None:
    original, steps = type(llama).forward, []

    def forward(self: PreTrainedModel, *args: object, **kwargs: object) -> object:
        outputs = original(self, *args, **kwargs)
        steps.append(1)
        if len(steps) > 5:
            outputs.logits = outputs.logits * 2
        return outputs

    monkeypatch.setattr(type(llama), "forward", forward)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM has begun to change its logits"):
        llama.generate(IDS, **LONG)


@pytest.mark.parametrize("counted", [True, False], ids=["in place", "data"])
def test_weights_that_change_between_count(llama, left_out, counted) -> None:
    before = llama.generate(IDS, **LONG)
    weight = llama.lm_head.weight
    with torch.no_grad():
        (weight if counted else weight.data).copy_(torch.randn_like(weight))
    after = llama.generate(IDS, **LONG)
    assert not torch.equal(before, after)
    assert torch.equal(after, plainly(llama))
    assert len(left_out) >= 2 * min(ALL_STEPS)


def assert_counts_meanwhile(
    model: PreTrainedModel, change: Callable[[PreTrainedModel], StoppingCriteriaList]
) -> None:
    """That what a criterion does to the weights of its model gives the tokens that it does without."""
    other = copy.deepcopy(model)
    hf_sparse.prepare(other)
    expected = other.generate(IDS, stopping_criteria=change(other), **LONG)
    assert torch.equal(model.generate(IDS, stopping_criteria=change(model), **LONG), expected)


def test_weights_that_change_meanwhile_count(llama, left_out) -> None:
    def change(model: PreTrainedModel) -> StoppingCriteriaList:
        def criterion(ids: Tensor, scores: None, **_: object) -> Tensor:
            with torch.no_grad():
                model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
            return torch.zeros(len(ids), dtype=torch.bool)

        return StoppingCriteriaList([criterion])

    assert_counts_meanwhile(llama, change)
    assert len(left_out) in ALL_STEPS


def test_inference_mode(llama, left_out) -> None:
    with torch.inference_mode():
        tokens = llama.generate(IDS, **LONG)
    assert torch.equal(tokens, plainly(llama))
    assert len(left_out) in ALL_STEPS


def test_adapters_elsewhere_are_computed_and_on_it_refused(llama, tiny_model, left_out) -> None:
    tuned = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    tokens = tuned.generate(input_ids=IDS, **LONG)
    assert len(left_out) in ALL_STEPS
    assert torch.equal(tokens, plainly(tuned.get_base_model()))
    base = tiny_model("llama")
    hf_sparse.patch(base, "relu")
    tuned = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(PatchError, match=r"needs an output layer that is an nn\.Linear and nothing more"):
        hf_sparse.prepare(tuned, greedy_output=True)


def test_copies_and_pickles_run_on_their_own_weights(llama, left_out) -> None:
    expected = llama.generate(IDS, **LONG)
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    for other in (copy.deepcopy(llama), torch.load(file, weights_only=False)):
        left_out.clear()
        assert torch.equal(other.generate(IDS, **LONG), expected)
        assert len(left_out) in ALL_STEPS
        with torch.no_grad():
            other.lm_head.weight.copy_(torch.randn_like(other.lm_head.weight))
        assert torch.equal(other.generate(IDS, **LONG), plainly(other))
    assert torch.equal(llama.generate(IDS, **LONG), expected)


@pytest.mark.parametrize("end", ["prepare", "linears", "unpatch"])
def test_it_ends(llama, left_out, end) -> None:
    assert type(llama.lm_head) is OutputLayer
    llama.generate(IDS, **LONG)
    assert left_out
    left_out.clear()
    if end == "unpatch":
        hf_sparse.unpatch(llama)
    else:
        hf_sparse.prepare(llama, linears=end == "prepare")
    assert "__call__" not in vars(llama)
    assert not any(isinstance(module, OutputLayer) for module in llama.modules())
    assert (type(llama.lm_head) is torch.nn.Linear) == (end != "prepare")
    llama.generate(IDS, **LONG)
    assert left_out == []


def test_what_is_saved_is_the_model(llama, tmp_path) -> None:
    llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(IDS, **LONG), plainly(llama))
    assert type(again.lm_head) is torch.nn.Linear


def test_what_does_not_go_together_is_an_error(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    with pytest.raises(PatchError, match="greedy_output=True and linears=False exclude each other"):
        hf_sparse.prepare(model, greedy_output=True, linears=False)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("cls", "config"), [(T5ForConditionalGeneration, T5Config), (LlamaModel, LlamaConfig)]
)
def test_models_that_do_not_go_on_with_a_prompt_are_an_error(cls, config) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 99}
    own = {"num_layers": 1, "d_model": 16} if config is T5Config else {"num_attention_heads": 2}
    model = cls(config(**{**sizes, **own}))
    hf_sparse.patch(model, "relu")
    with pytest.raises(PatchError, match="greedy_output=True is for models that go on with a prompt"):
        hf_sparse.prepare(model, greedy_output=True)


def test_methods_of_somebody_else_are_called(llama, left_out) -> None:
    expected = plainly(llama)
    stock, processors = llama.generate, type(llama)._get_logits_processor
    llama.generate = lambda ids, **options: stock(ids, **options)
    llama._get_logits_processor = lambda **given: LogitsProcessorList(
        [*processors(llama, **given), lambda ids, scores: scores.flip(-1)]
    )
    hf_sparse.prepare(llama, greedy_output=True)
    flipped = llama.generate(IDS, **LONG)
    assert not torch.equal(flipped, expected)
    assert left_out == []
    del llama.generate, llama._get_logits_processor
    calls = []
    vars(llama)["__call__"] = lambda *args, **given: calls.append(1) or llama(*args, **given)
    assert torch.equal(llama.generate(IDS, **LONG), expected)
    assert calls
    assert left_out == []


def test_a_shallow_copy_runs_on_what_it_has(llama, left_out) -> None:
    other = copy.copy(llama)
    other._modules = dict(llama._modules)
    other.lm_head = torch.nn.Linear(32, 128, bias=False).requires_grad_(False)
    other.generation_config = copy.copy(llama.generation_config)
    found = other.generate(IDS, **LONG)
    assert left_out == []
    assert torch.equal(found, plainly(other))
    assert not torch.equal(found, llama.generate(IDS, **LONG))


def lens(model: PreTrainedModel, seen: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: seen.append(model.lm_head(model.model.norm(output)))


def test_a_logit_lens_sees_all(llama, left_out) -> None:
    """Who calls the output layer from within the model, from the first step on, or later."""
    seen: list[Tensor] = []
    handle = llama.model.layers[1].register_forward_hook(lens(llama, seen))
    tokens = llama.generate(IDS, **LONG)
    handle.remove()
    assert len(seen) == 40
    assert all(logits.isfinite().all() for logits in seen)
    assert left_out == []
    assert torch.equal(tokens, plainly(llama))

    def later(ids: Tensor, scores: None, **_: object) -> Tensor:
        if ids.shape[1] == 10:
            llama.model.layers[1].register_forward_hook(lens(llama, seen))
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(RuntimeError, match="has begun to call its output layer more than once"):
        llama.generate(IDS, stopping_criteria=StoppingCriteriaList([later]), **LONG)


def test_a_criterion_that_calls_by_the_name_of_the_loop_gets_all(llama, left_out) -> None:
    seen: list[Tensor] = []

    def criterion(ids: Tensor, scores: None, **_: object) -> Tensor:
        seen.append(llama.__call__(ids[:, -1:]).logits)
        return torch.zeros(len(ids), dtype=torch.bool)

    tokens = llama.generate(IDS, stopping_criteria=StoppingCriteriaList([criterion]), **LONG)
    assert torch.equal(tokens, plainly(llama))
    assert left_out
    assert all(logits.isfinite().all() for logits in seen)


@pytest.mark.parametrize("inference", [False, True])
def test_logits_that_are_changed_in_place_later_on(llama, left_out, monkeypatch, inference) -> None:
    original, steps = type(llama).forward, []

    def forward(self: PreTrainedModel, *args: object, **kwargs: object) -> object:
        outputs = original(self, *args, **kwargs)
        steps.append(1)
        if len(steps) > 5:
            outputs.logits.neg_()
        return outputs

    monkeypatch.setattr(type(llama), "forward", forward)
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match="has begun to change its logits"):
        llama.generate(IDS, **LONG)


@pytest.mark.parametrize("what", ["another", "view"])
def test_a_weight_that_is_exchanged_meanwhile_counts(llama, left_out, what) -> None:
    def change(model: PreTrainedModel) -> StoppingCriteriaList:
        torch.manual_seed(1)
        both = torch.randn(2, *model.lm_head.weight.shape)

        def criterion(ids: Tensor, scores: None, **_: object) -> Tensor:
            if what == "view":
                model.lm_head.weight = torch.nn.Parameter(both[ids.shape[1] % 2], requires_grad=False)
            else:
                model.lm_head.weight = None
                model.lm_head.weight = torch.nn.Parameter(torch.randn(both[0].shape))
            return torch.zeros(len(ids), dtype=torch.bool)

        return StoppingCriteriaList([criterion])

    assert_counts_meanwhile(llama, change)
    assert left_out


def test_a_product_that_is_replaced_is_called(llama, left_out, monkeypatch) -> None:
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: -linear(x, w, b))
    assert torch.equal(llama.generate(IDS, **LONG), plainly(llama))
    assert left_out == []


def test_a_loop_of_its_own_gets_all(llama, left_out, monkeypatch) -> None:
    def second_best(self: PreTrainedModel, input_ids: Tensor, **_: object) -> Tensor:
        for _ in range(40):
            logits = self.__call__(input_ids).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.topk(2).indices[:, 1:]], 1)
        return input_ids

    monkeypatch.setattr(type(llama), "_sample", second_best)
    assert torch.equal(llama.generate(IDS, **LONG), plainly(llama))
    assert left_out == []


def test_hooks_of_accelerate_on_the_output_layer(llama, left_out) -> None:
    add_hook_to_module(llama.lm_head, ModelHook())
    assert torch.equal(llama.generate(IDS, **LONG), plainly(llama))
    assert left_out == []
    hf_sparse.unpatch(llama)
    llama(IDS)
    remove_hook_from_module(llama.lm_head)
    assert type(llama.lm_head) is torch.nn.Linear
    llama(IDS)


def test_an_output_layer_that_comes_from_another_model(llama, tiny_model, left_out) -> None:
    other = tiny_model("llama")
    other.lm_head = llama.lm_head
    prepared(other)
    assert torch.equal(other.generate(IDS, **LONG), plainly(other))
    assert left_out
