"""certify=True: the same bits with fewer bytes read, and no certificate that outlives its weight."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.mutation_guard import install_generation_tagging_init
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from support.activations import FIELDS
from support.compiler import CPP, needs_compiler
from support.pairs import pairs
from support.peek import certified, sparse_blocks
from support.skips import CountSkips
from triton_ops.activations import TABLE
from triton_ops.certificate import weight_stamp


def decode(model, backend: str, prompt: torch.Tensor, tokens: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens ``[n]`` and the logits ``[n, V]`` of every step."""
    with hf_sparse.backend(backend):
        out = model.generate(
            prompt,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0], torch.cat(out.logits)


def patch(model, activation: str = "relu", **fields):
    """Patch ``model``, to be decoded with certificates."""
    report = hf_sparse.patch(model, activation, **fields)
    hf_sparse.prepare(model, certify=True, linears=False)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("activation", [name for name in FIELDS if TABLE[name].certifiable])
def test_real_llama_gives_the_dense_tokens_and_the_uncertified_bits(assets, activation, backend) -> None:
    folder = assets / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time, there was", return_tensors="pt").input_ids
    patch(model, activation, **FIELDS[activation])
    layers = len(hf_sparse.inspect(model).blocks)
    dense, _ = decode(model, "dense", prompt, 50)
    with CountSkips() as skips:
        tokens, logits = decode(model, backend, prompt, 50)
    assert skips.count == 50 * layers
    assert skips.certified == 49 * layers  # the prompt is several tokens, which are computed without
    hf_sparse.prepare(model, certify=False, linears=False)
    with CountSkips() as skips:
        uncertified, expected = decode(model, backend, prompt, 50)
    assert skips.certified == 0
    assert torch.equal(tokens, dense)
    assert torch.equal(tokens, uncertified)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt_neox", "phi", "llama"])
def test_plain_and_gated_blocks_in_both_precisions(tiny_model, name, dtype, backend) -> None:
    model = tiny_model(name).to(dtype)
    patch(model, "fatrelu", threshold=0.1)
    prompt = torch.randint(3, 128, (1, 6))
    with CountSkips() as skips:
        tokens, logits = decode(model, backend, prompt)
    assert skips.certified == 23 * 3
    hf_sparse.prepare(model, certify=False, linears=False)
    assert all(map(torch.equal, decode(model, backend, prompt), (tokens, logits)))


def tensor_bytes() -> int:
    """Of everything alive in this process, each piece of memory once."""
    gc.collect()
    # Of exactly these types: compilers leave fake tensors behind, which have no memory.
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta
    }
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "certify", "backend"), pairs(["llama", "gpt_neox"], [False, True], ["torch", CPP])
)
def test_memory_beyond_the_dense_models(tiny_model, name, certify, backend) -> None:
    model = tiny_model(name)
    prompt = torch.randint(3, 128, (1, 6))
    decode(model, "dense", prompt)
    before = tensor_bytes()
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, certify=certify)
    with CountSkips() as skips:
        decode(model, backend, prompt)
    assert skips.certified == (23 * 3 if certify else 0)
    neurons, hidden = 88, 32
    assert tensor_bytes() - before == (3 * neurons * (hidden + 12) if certify else 0)
    assert not dict(model.named_buffers()).keys() - dict(tiny_model(name).named_buffers()).keys()
    assert model.state_dict().keys() == tiny_model(name).state_dict().keys()
    hf_sparse.unpatch(model)
    assert tensor_bytes() == before


def negate(model) -> None:
    """What was certified to be silent is active now."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.neg_()


def optimizer_step(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()  # where there is a gradient, the weight is being trained
    del optimizer  # which holds the weights
    gc.collect()


def load_state_dict(model) -> None:
    model.load_state_dict({k: -v if "gate" in k else v for k, v in model.state_dict().items()})


def replace_parameters(model) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight = torch.nn.Parameter(-layer.mlp.gate_proj.weight.detach())


def replace_data(model) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data = -layer.mlp.gate_proj.weight.data


def replace_data_twice(model) -> None:
    """The second time, the memory of the first weight may be taken again."""
    for layer in model.model.layers:
        weight = layer.mlp.gate_proj.weight
        weight.data = weight.data * -2
        weight.data = weight.data / 2


def replace_parameters_in_the_same_memory(model) -> None:
    """Neither the address nor the version tells."""
    for layer in model.model.layers:
        old = layer.mlp.gate_proj.weight
        new = layer.mlp.gate_proj.weight = torch.nn.Parameter(old.data)
        with torch.no_grad():
            new.neg_()
            while new._version < old._version:
                new.mul_(1)
        assert weight_stamp(new) == weight_stamp(old)


def train_through_data(model) -> None:
    model.train()
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data.neg_()
    model.eval()


def edit_through_data_and_prepare(model) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data.neg_()
    with hf_sparse.backend("cpp"):
        hf_sparse.prepare(model, certify=True, linears=False)


def edit_in_inference_mode(model) -> None:
    with torch.inference_mode():
        negate(model)


def to_bfloat16(model) -> None:
    model.to(torch.bfloat16)


def merge_lora(model) -> None:
    """PEFT adds to the base weight through ``.data``, then puts the very same layer back."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    assert wrapped.eval().merge_and_unload() is model
    del wrapped, parameter
    gc.collect()  # PEFT's layers held the weights


CHANGES = (
    negate, optimizer_step, load_state_dict, replace_parameters, replace_parameters_in_the_same_memory,
    replace_data,
    replace_data_twice,
    train_through_data, edit_through_data_and_prepare, edit_in_inference_mode, to_bfloat16, merge_lora,
)  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_certified_anew(tiny_model, change) -> None:
    model = tiny_model("llama")
    patch(model, "relu")
    prompt = torch.randint(3, 128, (1, 1))
    _, before = decode(model, "cpp", prompt)
    change(model)
    with CountSkips() as skips:
        tokens, logits = decode(model, "cpp", prompt)
    assert skips.certified == 24 * 3
    assert certified(model) == [True] * 3
    assert not torch.equal(logits, before)
    hf_sparse.prepare(model, certify=False, linears=False)
    assert all(map(torch.equal, decode(model, "cpp", prompt), (tokens, logits)))


def test_certificates_come_at_the_first_token_or_with_prepare_and_go_with_training(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, SparsityConfig(layers=(0, 2)))
    hf_sparse.prepare(
        model, certify=True
    )  # for the automatic choice, which does not skip in so small a model
    assert certified(model) == [False, False]
    decode(model, "dense", torch.arange(3, 6)[None])
    assert certified(model) == [False, False]
    with hf_sparse.backend("torch"):
        hf_sparse.prepare(model, certify=True, linears=False)
    assert certified(model) == [True, True]
    model.train()
    assert certified(model) == [False, False]
    with hf_sparse.backend("torch"):
        model(torch.ones(1, 1, dtype=torch.int64)).logits.sum().backward()
    assert certified(model) == [False, False]
    decode(model.eval(), "torch", torch.arange(3, 6)[None])
    assert certified(model) == [True, True]
    model.half().float()  # new values may lie where the old ones were, and no version is counted
    assert certified(model) == [False, False]
    decode(model, "torch", torch.arange(3, 6)[None])
    assert certified(model) == [True, True]
    blocks = list(sparse_blocks(model))
    hf_sparse.unpatch(model)
    assert all(block._certified._held is None for block in blocks)


def test_no_certificate_where_it_would_not_pay(tiny_model) -> None:
    model = tiny_model("llama")  # too small for the automatic choice to skip
    patch(model, "relu")
    assert certified(model) == [False] * 3


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_carry_no_certificate_and_make_their_own(tiny_model, how) -> None:
    model = tiny_model("llama")
    patch(model, "relu")
    prompt = torch.arange(3, 6)[None]
    expected = decode(model, "torch", prompt)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert certified(twin) == [False] * 3
    negate(model)
    torch.testing.assert_close(decode(twin, "torch", prompt), expected)
    # What is unpickled lies in memory that torch has not allocated, and may be anybody's.
    assert certified(twin) == [how == "deepcopy"] * 3


def test_weights_that_count_no_versions_are_not_certified(tiny_model) -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
        patch(model, "relu")
        prompt = torch.arange(3, 6)[None]
        with CountSkips() as skips:
            tokens, _ = decode(model, "torch", prompt)
        assert skips.count > 0
        assert skips.certified == 0
        assert torch.equal(tokens, decode(model, "dense", prompt)[0])


def test_a_certificate_made_in_inference_mode_serves_outside_of_it(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = patch(model, "relu").blocks
    x = torch.randn(1, 32)
    with hf_sparse.backend("torch"):
        with torch.inference_mode():
            first = block.module(x)
        with torch.no_grad():
            assert torch.equal(block.module(x), first)
    assert not any(t.is_inference() for t in block.module._certified._held.value)


def test_an_adapter_on_the_gate_ends_it_and_leaves_the_down_projection_skipping(tiny_model) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    patch(model, "relu")
    decode(model, "torch", torch.arange(3, 6)[None])
    assert certified(model) == [True] * 3
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj"], task_type="CAUSAL_LM"))
    assert certified(wrapped) == [False] * 3
    with CountSkips() as skips, hf_sparse.backend("torch"), torch.no_grad():
        wrapped.eval()(input_ids=torch.ones(1, 1, dtype=torch.int64))
    assert (skips.count, skips.certified) == (3, 0)


def test_it_is_a_way_of_running_and_not_of_the_checkpoint(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    assert patch(model, "relu").stock_name == "relu"
    prompt = torch.arange(3, 6)[None]
    expected = decode(model, "torch", prompt)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with CountSkips() as skips:
        assert all(map(torch.equal, decode(loaded, "torch", prompt), expected))
    assert skips.certified == 0
    hf_sparse.prepare(loaded, certify=True, linears=False)
    with CountSkips() as skips:
        assert all(map(torch.equal, decode(loaded, "torch", prompt), expected))
    assert skips.certified == 23 * 3


class TestOriginal:
    """Keeping the model's own activation and certifying it: if it is zero below a threshold."""

    def test_of_a_model_that_is_sparse_as_it_comes(self, tiny_model) -> None:
        model = tiny_model("nemotron")  # squared ReLU
        patch(model, "original")
        with CountSkips() as skips:
            decode(model, "torch", torch.arange(3, 6)[None])
        assert skips.certified == 23 * 3

    def test_of_a_dense_model_is_refused(self, tiny_model) -> None:
        model = tiny_model("llama")
        hf_sparse.patch(model, "original")
        with pytest.raises(PatchError, match=r"exactly zero; the blocks of this LlamaForCausalLM have SiLU"):
            hf_sparse.prepare(model, certify=True, linears=False)
        assert not any(block.certify for block in sparse_blocks(model))


class TestUncountedChanges:
    """Through ``.data`` torch counts no change: only who else holds the weight tells."""

    def ratio(self, model) -> float:
        """The relative error of a decoded token against the dense computation."""
        token = torch.arange(3, 4)[None]
        with torch.no_grad():
            with hf_sparse.backend("cpp"):
                found = model(token, use_cache=False).logits
            with hf_sparse.backend("dense"):
                expected = model(token, use_cache=False).logits
        return ((found - expected).norm() / expected.norm()).item()

    @needs_compiler
    @pytest.mark.parametrize(
        "holder", ["parameter", "parameters", "module", "modules", "stock", "data", "array"]
    )
    @pytest.mark.parametrize("since", ["before the patch", "before decoding", "after decoding"])
    def test_by_who_holds_a_reference(self, tiny_model, holder, since) -> None:
        model = tiny_model("llama")

        def weights():
            """From now on held; later the weights."""
            mlps = [layer.mlp for layer in model.model.layers]
            return {
                "parameter": lambda: [mlp.gate_proj.weight for mlp in mlps],
                "parameters": lambda: [p for n, p in model.named_parameters() if "gate_proj" in n],
                "module": lambda: [mlp.gate_proj for mlp in mlps],
                "modules": lambda: [m for n, m in model.named_modules() if n.endswith("gate_proj")],
                "stock": lambda: mlps,
                "data": lambda: [mlp.gate_proj.weight.data for mlp in mlps],
                "array": lambda: [mlp.gate_proj.weight.detach().numpy() for mlp in mlps],
            }[holder]()

        held = weights() if since == "before the patch" else None
        patch(model, "relu")
        if since == "before decoding":
            held = weights()
        assert self.ratio(model) < 1e-5
        if since == "after decoding":
            held = weights()
        assert self.ratio(model) < 1e-5
        for one in held:
            one = getattr(one, "gate_proj", one)
            data = getattr(getattr(one, "weight", one), "data", one)
            data = torch.from_numpy(one) if holder == "array" else data
            data.neg_()
        assert self.ratio(model) < 1e-5

    @needs_compiler
    @pytest.mark.parametrize("what", ["parameter", "module", "stock"])
    @pytest.mark.parametrize("since", ["before the patch", "before decoding", "after decoding"])
    def test_by_who_holds_a_weak_reference(self, tiny_model, what, since) -> None:
        model = tiny_model("llama")

        def references():
            mlps = [layer.mlp for layer in model.model.layers]
            found = {
                "parameter": [mlp.gate_proj.weight for mlp in mlps],
                "module": [mlp.gate_proj for mlp in mlps],
                "stock": [getattr(mlp, "stock", mlp) for mlp in mlps],
            }[what]
            return [weakref.ref(one) for one in found]

        held = references() if since == "before the patch" else None
        patch(model, "relu")
        if since == "before decoding":
            held = references()
        assert self.ratio(model) < 1e-5
        if since == "after decoding":
            held = references()
        assert self.ratio(model) < 1e-5
        for reference in held:
            weight = reference()
            for name in ("gate_proj", "weight"):
                weight = getattr(weight, name, weight)
            weight.data.neg_()
        del weight
        assert self.ratio(model) < 1e-5
        with CountSkips() as skips, hf_sparse.backend("cpp"), torch.no_grad():
            model(torch.arange(3, 4)[None], use_cache=False)
        assert (skips.count, skips.certified) == (3, 0)
        del held, reference
        with CountSkips() as skips, hf_sparse.backend("cpp"), torch.no_grad():
            model(torch.arange(3, 4)[None], use_cache=False)
        assert skips.certified == 3

    @needs_compiler
    def test_references_that_the_compiler_keeps_to_modules_end_nothing(self, tiny_model, tmp_path) -> None:
        """And those that loading has kept: neither gets anybody at a weight."""
        model = tiny_model("llama")
        hf_sparse.patch(model, "relu")
        model.save_pretrained(tmp_path)
        install_generation_tagging_init()  # as the first torch.compile of a process does
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        hf_sparse.prepare(model, certify=True, linears=False)
        (block, *_) = sparse_blocks(model)
        assert weakref.getweakrefcount(vars(block)["_modules"]["gate_proj"])
        with CountSkips() as skips, hf_sparse.backend("cpp"), torch.no_grad():
            model(torch.arange(3, 4)[None], use_cache=False)
        assert skips.certified == 3

    @needs_compiler
    def test_by_a_thread_while_the_certificate_is_made(self, tiny_model) -> None:
        model = tiny_model("llama")
        patch(model, "relu")
        block, *_ = sparse_blocks(model)
        block.disclose()
        make, threads = block._certified._made_by, ThreadPoolExecutor(1)

        def made_meanwhile(weight):
            certificate = make(weight)
            threads.submit(lambda: block.gate_proj.weight.data.neg_() is None).result()
            return certificate

        block._certified._made_by = made_meanwhile
        assert self.ratio(model) < 1e-5  # the weight is another one at the end of each call
        block._certified._made_by = make
        assert self.ratio(model) < 1e-5
        threads.shutdown()

    @needs_compiler
    @pytest.mark.parametrize("way", ["gate_proj", "stock"])
    def test_by_a_thread_that_is_about_to_take_the_layer(self, tiny_model, way) -> None:
        """A call that comes just when the block has disclosed what it keeps."""
        model = tiny_model("llama")
        patch(model, "relu")
        block, *_ = sparse_blocks(model)
        assert self.ratio(model) < 1e-5
        disclose, calls = block.disclose, []

        def disclose_and_decode():
            disclose()
            if not calls:
                calls.append(1)
                assert self.ratio(model) < 1e-5

        block.disclose = disclose_and_decode
        taken = getattr(block, way)
        del block.disclose
        getattr(taken, "gate_proj", taken)._parameters["weight"].data.neg_()
        del taken
        assert calls
        assert self.ratio(model) < 1e-5

    def test_an_optimizer_at_hand_ends_their_use_and_skipping(self, tiny_model) -> None:
        model = tiny_model("llama")
        patch(model, "relu")
        prompt = torch.arange(3, 4)[None]
        expected = decode(model, "torch", prompt)
        optimizer = torch.optim.AdamW(model.parameters())
        with CountSkips() as skips:
            torch.testing.assert_close(decode(model, "torch", prompt), expected)
        assert (skips.count, skips.certified) == (0, 0)
        del optimizer
        gc.collect()
        with CountSkips() as skips:
            assert all(map(torch.equal, decode(model, "torch", prompt), expected))
        assert skips.certified == 24 * 3
