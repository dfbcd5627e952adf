"""Where weights may be, in what dtype and whose: every way of loading, moving and copying a patched model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate import load_checkpoint_and_dispatch as load_and_dispatch
from torch import nn
from torch.multiprocessing import spawn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from support.peek import layouts, sparse_blocks
from support.skips import CountSkips
from support.twins import IDS, KINDS, assert_close, by_hand, logits, stock, twins

FEW_BYTES = {"cpu": "40KB"}
"""So that most of a model goes to the disk."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def skipped(model: nn.Module, expected: torch.Tensor, tolerance: float = 1e-4) -> int:
    """How many blocks skip in a forward, which gives what is ``expected`` in any case."""
    with CountSkips() as skips:
        assert_close(logits(model, "torch"), expected, tolerance)
    return skips.count


class TestDeviceMap:
    def test_auto(self, kind, tmp_path) -> None:
        model, reference = twins(kind)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        assert skipped(loaded, logits(reference)) == 2

    @pytest.mark.parametrize("first", ["patch", "load"])
    def test_auto_with_too_little_memory(self, kind, first, tmp_path) -> None:
        """What does not fit is read from the disk at each call, and runs dense; what fits skips."""
        model, reference = twins(kind)
        (model if first == "patch" else stock(kind)).save_pretrained(tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map="auto", max_memory=FEW_BYTES, offload_folder=tmp_path / "offloaded"
        )
        assert "disk" in loaded.hf_device_map.values()
        if first == "load":
            hf_sparse.patch(loaded, "relu")
        assert len(hf_sparse.inspect(loaded).blocks) == 2
        assert 0 <= skipped(loaded, logits(reference)) < 2
        hf_sparse.unpatch(loaded)
        assert_close(logits(loaded), logits(stock(kind)))

    @pytest.mark.parametrize("how", ["cpu", "disk", "hooks alone"])
    @pytest.mark.parametrize("first", ["patch", "offload"])
    def test_offloaded_by_accelerate(self, kind, how, first, tmp_path) -> None:
        model, reference = twins(kind)
        if first == "patch":
            assert skipped(model, logits(reference)) == 2
        else:
            hf_sparse.unpatch(model)
        if how == "cpu":
            cpu_offload(model, torch.device("cpu"))
        elif how == "disk":
            disk_offload(model, tmp_path, torch.device("cpu"))
        else:
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
        if first == "offload":
            hf_sparse.patch(model, "relu")
        count = skipped(model, logits(reference))
        assert count == 0 or (how == "hooks alone" and kind == "mixtral")  # its parameters are no layers
        assert_close(logits(model), logits(reference))
        if how != "hooks alone":
            assert all(parameter.is_meta for parameter in model.parameters())

    def test_an_offloaded_model_is_saved_whole(self, kind, tmp_path) -> None:
        model, reference = twins(kind)
        model.save_pretrained(tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map="auto", max_memory=FEW_BYTES, offload_folder=tmp_path / "offloaded"
        )
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert skipped(again, logits(reference)) == 2


class TestMeta:
    def test_a_skeleton_gets_its_weights_from_a_state_dict(self, kind, tmp_path) -> None:
        model, reference = twins(kind)
        model.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config).eval()
        assert all(parameter.is_meta for parameter in empty.parameters())
        assert len(hf_sparse.inspect(empty).blocks) == 2
        empty.load_state_dict(model.state_dict(), assign=True)
        del model  # who holds the same memory
        for buffer in ("inv_freq", "original_inv_freq"):
            if hasattr(getattr(empty.model, "rotary_emb", None), buffer):
                setattr(empty.model.rotary_emb, buffer, getattr(reference.model.rotary_emb, buffer))
        assert skipped(empty, logits(reference)) == 2

    def test_a_skeleton_is_patched_and_filled_from_a_checkpoint(self, kind, tmp_path) -> None:
        """By accelerate, which knows nothing of the names in files: what is in memory is saved."""
        model, reference = twins(kind)
        safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
        with init_empty_weights(include_buffers=False):
            empty = type(model)(stock(kind).config).eval()
        hf_sparse.patch(empty, "relu")
        empty.tie_weights()
        filled = load_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
        assert skipped(filled, logits(reference)) == 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_built_where_torch_makes_another_dtype(self, kind, dtype, monkeypatch) -> None:
        """As DeepSpeed's ``zero.Init`` does it: blocks are recognised nevertheless."""
        config = twins(kind)[0].config

        def casting(function: Any) -> Any:
            def cast(*args: Any, **kwargs: Any) -> torch.Tensor:
                made = function(*args, **kwargs)
                return made.to(dtype) if made.is_floating_point() else made

            return cast

        with monkeypatch.context() as patched:
            for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn"):
                patched.setattr(torch, name, casting(getattr(torch, name)))
            model = AutoModelForCausalLM.from_config(config)
        assert len(hf_sparse.inspect(model).blocks) == 2

    def test_to_meta_and_to_empty(self, kind) -> None:
        model, _ = twins(kind)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        model.to("meta")
        model.to_empty(device="cpu")
        assert {name: value.shape for name, value in model.state_dict().items()} == shapes
        assert layouts(model) == {False}


class TestFiles:
    @pytest.mark.parametrize("tie", [False, True])
    def test_shards(self, kind, tie, tmp_path) -> None:
        model, reference = twins(kind, tie_word_embeddings=tie)
        assert skipped(model, logits(reference)) == 2
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
        assert torch.equal(logits(loaded), logits(reference))
        assert skipped(loaded, logits(reference)) == 2

    def test_the_files_are_those_of_the_stock_model(self, kind, tmp_path) -> None:
        model, reference = twins(kind)
        logits(model, "torch")
        for one, name in ((model, "sparse"), (reference, "by hand")):
            one.save_pretrained(tmp_path / name)
        found, expected = (
            safetensors.torch.load_file(tmp_path / name / "model.safetensors")
            for name in ("sparse", "by hand")
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())

    def test_a_state_dict_in_the_place_of_files(self, kind, tmp_path) -> None:
        model, reference = twins(kind)
        model.save_pretrained(tmp_path)
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
        config = AutoConfig.from_pretrained(tmp_path)
        loaded = type(model).from_pretrained(None, config=config, state_dict=state)
        assert torch.equal(logits(loaded.eval(), "dense"), logits(reference))

    def test_pickled_weights_in_the_place_of_safetensors(self, kind, tmp_path) -> None:
        model, reference = twins(kind, tie_word_embeddings=False)
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        torch.save(safetensors.torch.load_file(path), tmp_path / "pytorch_model.bin")
        path.unlink()
        assert skipped(AutoModelForCausalLM.from_pretrained(tmp_path), logits(reference)) == 2

    def test_another_head_finds_the_body(self, kind, tmp_path) -> None:
        from transformers import AutoModelForSequenceClassification

        model, reference = twins(kind)
        model.save_pretrained(tmp_path)
        torch.manual_seed(1)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        found, expected = (one.base_model(IDS, use_cache=False)[0] for one in (loaded, reference))
        assert torch.equal(found, expected)


class TestTiedWeights:
    def test_training_one_end_trains_the_other(self, kind) -> None:
        model, reference = twins(kind, tie_word_embeddings=True)
        for one in (model, reference):
            torch.optim.SGD(one.parameters(), lr=0.1).zero_grad()
            one(IDS, labels=IDS, use_cache=False).loss.backward()
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter -= 0.01 * parameter.grad
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert_close(logits(model), logits(reference))

    def test_a_larger_vocabulary(self, kind) -> None:
        model, reference = twins(kind, tie_word_embeddings=True)
        for one in (model, reference):
            torch.manual_seed(2)
            one.resize_token_embeddings(140, mean_resizing=False)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert logits(model).shape[-1] == 140
        assert skipped(model, logits(reference)) == 2


class TestDtypes:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.5), (torch.float16, 0.1)])
    def test_loaded_in_another(self, kind, dtype, tolerance, tmp_path) -> None:
        model, _ = twins(kind)
        model.save_pretrained(tmp_path / "sparse")
        stock(kind).save_pretrained(tmp_path / "stock")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        expected = logits(by_hand(AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=dtype)))
        assert torch.equal(logits(loaded), expected)
        assert skipped(loaded, expected, tolerance) == 2

    def test_changed_after_skipping(self, kind) -> None:
        model, reference = twins(kind)
        assert skipped(model, logits(reference)) == 2
        assert skipped(model.bfloat16(), logits(reference.bfloat16()), 0.5) == 2
        assert skipped(model.float(), logits(reference.float())) == 2
        assert torch.equal(logits(model.half()), logits(reference.half()))
        assert layouts(model) == {False}

    def test_one_that_the_kernels_do_not_have(self, kind) -> None:
        """Forced, it is refused; else the model runs dense."""
        model, reference = (one.double() for one in twins(kind, experts_implementation="eager"))
        with torch.no_grad(), CountSkips() as skips:
            found = model(IDS[:1, :1], use_cache=False).logits
            assert_close(found, reference(IDS[:1, :1], use_cache=False).logits)
        assert skips.count == 0
        with pytest.raises(RuntimeError, match=r"cannot run here: it has no kernel for torch\.float64"):
            logits(model, "torch")

    def test_the_blocks_alone_in_another(self, kind) -> None:
        """As tools that keep some modules in float32 do, with a cast before and after each."""
        model, reference = (one.bfloat16() for one in twins(kind))
        for one in (model, reference):
            for layer in (one.model.decoder if kind == "opt" else one.model).layers:
                first, last = (layer.fc1, layer.fc2) if kind == "opt" else (layer.mlp, layer.mlp)
                first.float().register_forward_pre_hook(lambda m, args: (args[0].float(), *args[1:]))
                last.float().register_forward_hook(lambda m, args, out: out.bfloat16())
        expected = logits(reference)
        assert skipped(model, expected, 0.5) == (0 if kind == "opt" else 2)  # OPT has the hooks on its layers

    def test_autocast(self, kind) -> None:
        model, reference = twins(kind)
        with torch.autocast("cpu", torch.bfloat16):
            expected = logits(reference)
            assert skipped(model, expected, 0.5) == 0


class TestCopies:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "after skipping"])
    def test_have_weights_of_their_own(self, kind, way) -> None:
        model, reference = twins(kind)
        expected = logits(reference)
        if way == "after skipping":
            assert skipped(model, expected) == 2
        twin: PreTrainedModel
        if way == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        del parameter
        assert skipped(twin, expected) == 2
        assert not logits(model, "torch").any()
        hf_sparse.unpatch(twin)
        assert_close(logits(by_hand(twin)), expected)

    def test_what_torch_reads_into_its_own_memory_runs_dense(self, kind) -> None:
        """Torch cannot tell that memory from a borrowed array; a copy has some of its own."""
        model, reference = twins(kind)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert skipped(loaded, logits(reference)) == 0
        with pytest.warns(UserWarning, match="2 of 2 MLP blocks run dense for now"):
            hf_sparse.prepare(loaded)
        assert skipped(copy.deepcopy(loaded), logits(reference)) == 2

    def test_a_copy_of_the_config_makes_a_patched_model(self, kind) -> None:
        model, reference = twins(kind)
        twin = type(model)(copy.deepcopy(model.config)).eval()
        twin.load_state_dict(model.state_dict())
        assert skipped(twin, logits(reference)) == 2


def work(rank: int, models: dict[str, nn.Module], found: dict[str, torch.Tensor]) -> None:
    """In a process that was started anew: looks, and halves what it was given."""
    torch.set_num_threads(1)
    for kind, model in models.items():
        found[kind].copy_(logits(model, "torch"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)


@pytest.mark.slow
def test_a_process_that_is_spawned_shares_the_weights() -> None:
    models, references = ({kind: twins(kind)[i] for kind in KINDS} for i in range(2))
    expected = {kind: logits(model) for kind, model in references.items()}
    for kind, model in models.items():
        assert skipped(model, expected[kind]) == 2
        model.share_memory()
    found = {kind: torch.zeros_like(one).share_memory_() for kind, one in expected.items()}
    spawn(work, (models, found), nprocs=1)
    for kind, reference in references.items():
        assert_close(found[kind], expected[kind])
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(0.5)
        assert skipped(models[kind], logits(reference)) == 0
        assert all(parameter.is_shared() for parameter in models[kind].parameters())


def test_blocks_are_of_the_three_kinds() -> None:
    classes = [type(next(sparse_blocks(twins(kind)[0]))).__name__ for kind in KINDS]
    assert classes == ["SparseGatedMLP", "SparseExperts", "SparseLinear"]
