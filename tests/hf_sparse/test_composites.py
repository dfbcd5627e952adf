"""Models made of several: a patch of the outer one changes a part, and is saved and loaded with it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    PreTrainedModel,
    Qwen2VLTextModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.activations import ACT2FN

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.modules import SparseBlock
from support.composites import COMPOSITES, composite, inputs, logits

WITH_IMAGES = ("gemma3", "llava", "paligemma", "idefics2", "qwen2_vl", "qwen2_5_vl")


def patched(model: nn.Module) -> set[str]:
    """The first part of the names of its sparse blocks, down to the list of layers."""
    names = (name for name, module in model.named_modules() if isinstance(module, SparseBlock))
    return {name.split(".layers.")[0].split(".blocks.")[0] for name in names}


def with_relu(model: PreTrainedModel, inside: str) -> PreTrainedModel:
    """The same model, with the activation of all MLPs in the module called ``inside`` swapped by hand."""
    twin = copy.deepcopy(model)
    for module in twin.get_submodule(inside).modules():
        for name, child in module.named_children():
            if type(child) in {type(ACT2FN[act]) for act in ("silu", "gelu_pytorch_tanh", "relu2")}:
                setattr(module, name, nn.ReLU())
    return twin


LANGUAGE = {
    "gemma3": "model.language_model",
    "llava": "model.language_model",
    "paligemma": "model.language_model",
    "idefics2": "model.text_model",
    "qwen2_vl": "model.language_model",
    "qwen2_5_vl": "model.language_model",
    "got_ocr2": "model.language_model",
    "fuyu": "model.language_model",
    "video_llava": "model.language_model",
    "t5gemma": "model.decoder",
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_language_part_is_patched_saved_and_loaded_with_the_outer_model(name, tmp_path) -> None:
    model = composite(name)
    dense = logits(model, name)
    model.save_pretrained(tmp_path)  # which adds to the config
    config = model.config.to_dict()
    hf_sparse.patch(model, "original")
    assert torch.equal(logits(model, name), dense)
    by_hand = with_relu(model, LANGUAGE[name]) if name != "fuyu" else None
    hf_sparse.unpatch(model)

    hf_sparse.patch(model, "relu")
    assert patched(model) == {LANGUAGE[name]}
    expected = logits(model, name)
    assert not torch.equal(expected, dense)
    if by_hand is not None:
        torch.testing.assert_close(expected, logits(by_hand, name))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert patched(loaded) == {LANGUAGE[name]}
    assert torch.equal(logits(loaded, name), expected)
    assert hf_sparse.inspect(loaded).config == hf_sparse.inspect(model).config

    for one in (loaded, model):
        hf_sparse.unpatch(one)
        assert torch.equal(logits(one, name), dense)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", WITH_IMAGES)
@pytest.mark.parametrize("layers", [None, (0,)])
def test_another_part_is_patched_on_request(name, layers, tmp_path) -> None:
    model = composite(name)
    dense = logits(model, name)
    report = hf_sparse.patch(model, "fatrelu", threshold=0.2, part="vision", layers=layers)
    assert report.part == "vision"
    assert all(isinstance(model.get_submodule(block.name), SparseBlock) for block in report.blocks)
    assert len(report.blocks) == (2 if layers is None else 1)
    assert not any(hasattr(one, "hf_sparse") for one in (model.config, model.config.text_config))
    expected = logits(model, name)
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, name), expected)
    hf_sparse.unpatch(loaded, part="vision")
    assert torch.equal(logits(loaded, name), dense)


def test_two_parts_are_patched_each_in_its_way(tmp_path) -> None:
    model = composite("llava")
    dense = logits(model, "llava")
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2), part="vision")
    vision_only = logits(model, "llava")
    hf_sparse.patch(model, "jsrelu", mix=0.5)
    hf_sparse.set_mix(model, 0.75, part="text")
    expected = logits(model, "llava")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "llava"), expected)
    text, vision = hf_sparse.inspect(loaded).patched
    assert (text.part, vision.part) == ("text", "vision")
    assert text.config.activation.mix == 0.75
    assert vision.config.activation.threshold == (0.1, 0.2)
    hf_sparse.unpatch(loaded, part="text")
    assert torch.equal(logits(loaded, "llava"), vision_only)
    assert hf_sparse.inspect(loaded).part == "vision"
    with pytest.raises(
        PatchError, match="the part 'text' of this LlavaForConditionalGeneration is not patched"
    ):
        hf_sparse.unpatch(loaded, part="text")
    hf_sparse.unpatch(loaded)
    assert torch.equal(logits(loaded, "llava"), dense)
    with pytest.raises(PatchError, match="is not patched"):
        hf_sparse.unpatch(loaded)


def test_one_config_that_builds_two_models_patches_both_alike_or_none(tmp_path) -> None:
    model = composite("video_llava")
    dense = logits(model, "video_llava")
    for choice in ({"include": "*image*"}, {"include": "*image_tower*0.mlp"}):
        with pytest.raises(PatchError, match=r"include=.* matches no MLP block"):
            hf_sparse.patch(model, "relu", part="vision", **choice)
    assert not patched(model)
    report = hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2), part="vision")
    assert len(report.blocks) == 4
    expected = logits(model, "video_llava")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "video_llava"), expected)
    assert patched(loaded) == {"model.video_tower.encoder", "model.image_tower.encoder"}
    hf_sparse.unpatch(loaded)
    assert torch.equal(logits(loaded, "video_llava"), dense)


def test_one_of_two_models_of_one_config_patched_alone_is_not_saved(tmp_path) -> None:
    model = composite("video_llava")
    hf_sparse.patch(model.model.image_tower, "relu")
    for look in (lambda: hf_sparse.inspect(model), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(PatchError, match=r"video_tower and .*image_tower are built from one config"):
            look()
    assert not list(tmp_path.iterdir())


def test_what_else_reads_the_field_of_a_part_keeps_its_activation(tmp_path) -> None:
    """The connector of Idefics2 has the activation that the config of the text part names."""
    model = composite("idefics2")
    connector = model.model.connector.modality_projection
    before = type(connector.act_fn)
    assert hf_sparse.patch(model, "relu").stock_name is None  # in stock transformers it would have ReLU, too
    assert model.config.text_config.hidden_act == "hf_sparse"
    expected = logits(model, "idefics2")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert type(loaded.model.connector.modality_projection.act_fn) is before
    assert torch.equal(logits(loaded, "idefics2"), expected)


def test_a_part_patched_without_the_outer_model_is_saved_right_with_it(tmp_path) -> None:
    model = composite("idefics2")
    report = hf_sparse.patch(model.model.text_model, "relu")
    assert report.stock_name == "relu"  # as far as that model can know
    expected = logits(model, "idefics2")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["hidden_act"] == "hf_sparse"
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), "idefics2"), expected)


@pytest.mark.parametrize("threshold", [0.1, (0.1, 0.2, 0.3)])
def test_a_part_loaded_alone_from_the_checkpoint_of_the_whole(threshold, tmp_path) -> None:
    model = composite("qwen2_vl")
    hf_sparse.patch(model, "fatrelu", threshold=threshold)
    model.save_pretrained(tmp_path)
    ids = inputs("qwen2_vl")["input_ids"][:, 5:]
    alone = Qwen2VLTextModel.from_pretrained(tmp_path).eval()
    assert hf_sparse.inspect(alone).config == hf_sparse.inspect(model).config
    with torch.no_grad():
        want = model.model.language_model(input_ids=ids).last_hidden_state
        assert torch.equal(alone(input_ids=ids).last_hidden_state, want)


def test_the_class_for_causal_models_loads_the_composite_that_transformers_gives_it(tmp_path) -> None:
    model = composite("gemma3")
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "gemma3"), logits(model, "gemma3"))


def test_a_part_with_other_layers_than_its_record_is_refused(tmp_path) -> None:
    model = composite("gemma3")
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"][:2]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="blocks=3 is not the number of MLP blocks of this Gemma3TextModel"):
        type(model).from_pretrained(tmp_path)


def test_a_layer_removed_from_a_part_is_counted_when_the_whole_is_saved(tmp_path) -> None:
    model = composite("llava")
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3))
    language = model.model.language_model
    del language.layers[1]
    language.layers[1].self_attn.layer_idx = 1
    language.config.num_hidden_layers = 2
    expected = logits(model, "llava")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "llava"), expected)
    assert hf_sparse.inspect(loaded).config.activation.threshold == (0.1, 0.3)


def test_a_part_whose_config_was_replaced_is_not_saved(tmp_path) -> None:
    model = composite("llava")
    hf_sparse.patch(model, "relu", part="vision")
    hf_sparse.patch(model, "relu")
    model.config.vision_config = copy.deepcopy(composite("llava").config.vision_config)
    with pytest.raises(PatchError, match="it was replaced after the patch"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", [20, 2000])
def test_a_block_in_a_part_that_nests_without_end_is_refused(depth, tmp_path) -> None:
    model = composite("gemma3")
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"name": "relu"', f'"name": {"[" * depth}{"]" * depth}'))
    with pytest.raises(ValueError, match=r"hf_sparse.*nests more than|nests too deeply.*hf_sparse"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("place", "block", "named"),
    [
        ("text_config", {"activation": {"name": "evil"}}, "activation.name='evil'"),
        ("text_config", {"stock": {"field": "hidden_act", "activation": "silu"}}, "stock.field='hidden_act'"),
        ("text_config", {"stock": {"field": None, "activation": None}}, "which is UnpatchedActivation"),
        ("vision_config", {}, "stock.field='hidden_activation' is no field of SiglipVisionConfig"),
        ("", {}, "stock.field='hidden_activation' is no field of Gemma3Config"),
        ("", {"stock": {"field": None, "activation": None}}, "no MLP block outside of its parts"),
    ],
)
def test_a_malformed_or_misplaced_block_is_refused(place, block, named, tmp_path) -> None:
    model = composite("gemma3")
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    target = config[place] if place else config
    target["hf_sparse"] = config["text_config"]["hf_sparse"] | block
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match='"hf_sparse" block of the model config cannot be used') as error:
        type(model).from_pretrained(tmp_path)
    assert named in str(error.value)


def test_the_readme_is_about_the_parts_that_are_patched(tmp_path) -> None:
    model = composite("gemma3")
    hf_sparse.patch(model, "relu", part="vision")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "part 'vision': 2 MLP blocks patched" in card
    assert "'text'" not in card
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "part 'text': 3 MLP blocks patched" in card
    assert "part 'vision': 2 MLP blocks patched" in card
    hf_sparse.unpatch(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


PATCHES = (
    {"config": "relu"},
    {"config": "fatrelu", "threshold": 0.2},
    {"config": "relu", "layers": [1]},
    {"config": "relu", "mix": 0.5},
    {"config": "original"},
)
STEPS = st.one_of(
    st.tuples(st.just("patch"), st.sampled_from(["text", "vision"]), st.sampled_from(PATCHES)),
    st.tuples(st.just("patch one model"), st.sampled_from(["text", "vision"]), st.sampled_from(PATCHES)),
    st.tuples(st.just("unpatch"), st.sampled_from(["text", "vision", None])),
    st.tuples(st.just("mix"), st.sampled_from([0.25, 1.0])),
    st.tuples(st.just("copy")),
    st.tuples(st.just("save and load")),
)


def after(model: PreTrainedModel, step: tuple, folder: Path) -> PreTrainedModel:
    """The model after what a user does to it, or tries to."""
    try:
        if step[0] == "patch":
            hf_sparse.patch(model, part=step[1], **step[2])
        elif step[0] == "patch one model":
            inner = {"text": "text_model", "vision": "vision_model"}
            pair = {"text": "language_model", "vision": "image_tower"}
            names = inner if hasattr(model.model, "text_model") else pair
            hf_sparse.patch(getattr(model.model, names[step[1]]), **step[2])
        elif step[0] == "unpatch":
            hf_sparse.unpatch(model, part=step[1])
        elif step[0] == "mix":
            hf_sparse.set_mix(model, step[1])
        elif step[0] == "copy":
            return copy.deepcopy(model)
        else:
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder).eval()
    except ValueError:  # what cannot be done now; PatchError is one
        pass
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idefics2", "video_llava"])
@settings(deadline=None, max_examples=25)
@given(steps=st.lists(STEPS, min_size=1, max_size=6))
def test_whatever_was_done_before_what_is_saved_is_what_runs_or_nothing_is(name, steps) -> None:
    torch.manual_seed(0)
    model = composite(name)
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(steps):
            before = logits(model, name)
            model = after(model, step, Path(folder, str(number)))
            if step[0] in ("copy", "save and load"):
                assert torch.equal(logits(model, name), before)
        want, last = logits(model, name), Path(folder, "last")
        last.mkdir()
        try:
            model.save_pretrained(last)
        except PatchError:
            assert not list(last.iterdir())
            return
        again = type(model).from_pretrained(last).eval()
        assert torch.equal(logits(again, name), want)
        config = json.loads((last / "config.json").read_text())
        fields = [config[part]["hidden_act"] for part in ("text_config", "vision_config")]
        if any(isinstance(module, SparseBlock) for module in model.modules()) and "hf_sparse" not in fields:
            hf_sparse.uninstall()  # what transformers alone would load
            try:
                for part in ("text_config", "vision_config"):
                    config[part].pop("hf_sparse", None)
                (last / "config.json").write_text(json.dumps(config))
                torch.testing.assert_close(logits(type(model).from_pretrained(last).eval(), name), want)
            finally:
                hf_sparse.install()


def test_inspect_lists_the_parts_and_changes_nothing() -> None:
    model = composite("gemma3")
    modules, config = dict(model.named_modules()), model.config.to_dict()
    report = hf_sparse.inspect(model)
    text = str(report)
    assert "part 'text': 3 MLP blocks could be patched" in text
    assert "3 x Gemma3MLP (gated), 32 -> 88 -> 32" in text
    assert "part 'vision': 2 MLP blocks could be patched" in text
    assert [block.name for block in report.blocks] == [
        f"model.language_model.layers.{i}.mlp" for i in range(3)
    ]
    assert (dict(model.named_modules()), model.config.to_dict()) == (modules, config)
    hf_sparse.patch(model, "relu", part="vision")
    text = str(hf_sparse.inspect(model))
    assert "part 'vision': 2 MLP blocks patched" in text
    assert "part 'text': 3 MLP blocks could be patched" in text
    assert "2 x SiglipMLP" in str(hf_sparse.inspect(model, part="vision"))


class TestErrors:
    """Each leaves the model as it was."""

    @pytest.fixture
    def unchanged(self):
        model = composite("gemma3")
        modules, config, before = dict(model.named_modules()), model.config.to_dict(), logits(model, "gemma3")
        yield model
        assert dict(model.named_modules()) == modules
        assert model.config.to_dict() == config
        assert torch.equal(logits(model, "gemma3"), before)

    def test_no_such_part(self, unchanged) -> None:
        wanted = (
            r"part='audio' is no part of this Gemma3ForConditionalGeneration\. Parts with MLP blocks of a "
            r"known shape: 'vision' \(2 MLP blocks\), 'text' \(3 MLP blocks\)"
        )
        with pytest.raises(PatchError, match=wanted):
            hf_sparse.patch(unchanged, "relu", part="audio")

    def test_a_part_that_cannot_take_the_config(self, unchanged) -> None:
        with pytest.raises(PatchError, match="needs a gated MLP"):
            hf_sparse.patch(unchanged, "drelu", part="vision")
        with pytest.raises(PatchError, match="names block 3, but Gemma3TextModel has blocks 0 to 2"):
            hf_sparse.patch(unchanged, "relu", layers=[3])

    def test_set_mix_and_unpatch_need_a_patch(self, unchanged) -> None:
        for change in (lambda: hf_sparse.set_mix(unchanged, 0.5), lambda: hf_sparse.unpatch(unchanged)):
            with pytest.raises(PatchError, match="this Gemma3ForConditionalGeneration is not patched"):
                change()


def test_a_language_part_of_no_known_shape_names_the_parts_that_have_one() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**sizes, image_size=28, patch_size=14),
        BertConfig(**sizes, vocab_size=64, hidden_act="xielu"),
    )
    model = VisionEncoderDecoderModel(config)
    with pytest.raises(PatchError, match=r"in the part 'decoder' .* 'encoder' \(1 MLP blocks\)"):
        hf_sparse.patch(model, "relu")
    assert len(hf_sparse.patch(model, "relu", part="encoder").blocks) == 1


def test_measure_prepare_and_skipping_work_on_the_outer_model() -> None:
    model = composite("gemma3")
    hf_sparse.patch(model, "relu")
    batch = {"input_ids": inputs("gemma3")["input_ids"][:, 5:]}
    report = hf_sparse.measure(model, [batch])
    assert [layer.name for layer in report.layers] == [
        f"model.language_model.layers.{i}.mlp" for i in range(3)
    ]
    assert all(0 < layer.sparsity < 1 for layer in report.layers)
    hf_sparse.prepare(model)
    with torch.no_grad():
        dense = model(**batch).logits
        with hf_sparse.backend("torch"):
            torch.testing.assert_close(model(**batch).logits, dense)


PLAIN_LOAD = """
import sys
from pathlib import Path
import torch, transformers

torch.set_num_threads(int(sys.argv[2]))
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    given = torch.load(folder / "given.pt")
    cls = getattr(transformers, (folder / "class").read_text())
    try:
        with torch.no_grad():
            model = cls.from_pretrained(folder).eval()
            torch.save(model(**given, use_cache=False).logits, folder / "logits.pt")
    except KeyError as error:
        Path(folder, "refused").write_text(repr(error))
assert "hf_sparse" not in sys.modules
"""


@pytest.mark.slow
def test_without_hf_sparse_the_composite_is_the_same_or_refused(tmp_path) -> None:
    cases = {
        "same": ("llava", [{"config": "relu"}]),
        "same_both": ("llava", [{"config": "relu"}, {"config": "relu", "part": "vision"}]),
        "some": ("llava", [{"config": "relu", "layers": [0]}]),
        "vision": ("llava", [{"config": "relu"}, {"config": "jsrelu", "part": "vision"}]),
        "connector": ("idefics2", [{"config": "relu"}]),
    }
    expected = {}
    for case, (name, patches) in cases.items():
        model = composite(name)
        for fields in patches:
            hf_sparse.patch(model, **fields)
        model.save_pretrained(tmp_path / case)
        torch.save(inputs(name), tmp_path / case / "given.pt")
        (tmp_path / case / "class").write_text(type(model).__name__)
        expected[case] = logits(model, name)
    command = [sys.executable, "-c", PLAIN_LOAD, str(tmp_path), str(torch.get_num_threads())]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for case, want in expected.items():
        if case.startswith("same"):
            assert torch.equal(torch.load(tmp_path / case / "logits.pt"), want)
        else:
            assert Path(tmp_path, case, "refused").read_text() == "KeyError('hf_sparse')"
