"""What is saved comes back, bit for bit, with hf_sparse; and is right or refused without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.activations import is_stock
from hf_sparse.adapters import find_blocks
from support.activations import FIELDS, fits
from support.peek import layouts, zeroth_biases
from triton_ops.activations import TABLE

CONFIGS = {
    **{name: SparsityConfig.read(name, **FIELDS[name]) for name in TABLE},
    "original": SparsityConfig(activation="original"),
    "thresholds": SparsityConfig.read("fatrelu", threshold=(0.1, 1 / 3, 0.2)),
    "some_layers": SparsityConfig(layers=(0, 2)),
    "mixed": SparsityConfig.read("jsrelu", mix=0.3),
    "zeroth_bias": SparsityConfig(zeroth_bias={"positions": 12}),
    "zeroth_bias_of_some": SparsityConfig(layers=[1], zeroth_bias={"placement": "output", "positions": 64}),
    "topk": SparsityConfig(activation="original", topk={"share": 0.2}),
    "statistical_topk": SparsityConfig(statistical_topk={"sparsity": 0.8}),
    "norm_relu": SparsityConfig(norm_relu=True),
}
STOCK_EXPRESSIBLE = {"original", *filter(is_stock, TABLE)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_round_trip_is_bit_identical(tiny_model, input_ids, tmp_path, family, name) -> None:
    if CONFIGS[name].activation.relu_up and family in ("phi", "gpt2"):
        with pytest.raises(hf_sparse.PatchError, match="needs a gated MLP"):
            hf_sparse.patch(tiny_model(family), CONFIGS[name])
        return
    model = tiny_model(family)
    if not fits(CONFIGS[name].activation.name, find_blocks(model)[0][0].activation):
        with pytest.raises(hf_sparse.PatchError, match=r"CATS is for|keeps the large"):
            hf_sparse.patch(model, CONFIGS[name])
        return
    stock = model(input_ids).logits
    hf_sparse.patch(model, CONFIGS[name])
    for table in zeroth_biases(model):
        torch.nn.init.normal_(table)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    assert hf_sparse.inspect(loaded).config == CONFIGS[name]
    hf_sparse.unpatch(loaded)
    assert torch.equal(loaded(input_ids).logits, stock)


PLAIN_LOAD = """
import sys
from pathlib import Path
import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[2]))
ids = torch.load(Path(sys.argv[1], "ids.pt"))
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    try:
        torch.save(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, folder / "logits.pt")
    except KeyError as error:
        Path(folder, "refused").write_text(repr(error))
assert "hf_sparse" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_without_hf_sparse_the_model_is_the_same_or_refused(tiny_model, family, input_ids, tmp_path) -> None:
    expected = {}
    for name, config in CONFIGS.items():
        if (config.activation.relu_up or config.others) and family != "llama":
            continue
        model = tiny_model(family)
        if not fits(config.activation.name, find_blocks(model)[0][0].activation):
            continue
        hf_sparse.patch(model, config)
        model.save_pretrained(tmp_path / name)
        expected[name] = model(input_ids).logits
    torch.save(input_ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", PLAIN_LOAD, str(tmp_path), str(torch.get_num_threads())]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name, logits in expected.items():
        if name in STOCK_EXPRESSIBLE:
            assert torch.equal(torch.load(tmp_path / name / "logits.pt"), logits)
        else:
            assert (tmp_path / name / "refused").read_text() == "KeyError('hf_sparse')"


def test_weights_on_disk_are_stock_bytes(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "stock")
    hf_sparse.patch(model, "jsrelu")
    with torch.no_grad(), hf_sparse.backend("torch"):  # decoding stores the down projections neuron-major
        model(torch.randint(3, 128, (1, 1)))
    assert layouts(model) == {True}
    model.save_pretrained(tmp_path / "sparse")
    before = load_file(tmp_path / "stock" / "model.safetensors")
    after = load_file(tmp_path / "sparse" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_auto_class_and_direct_construction_patch(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "jsrelu")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for built in (
        AutoModel.from_pretrained(tmp_path),
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2),
        AutoModelForCausalLM.from_config(config),
        type(model)(config),
    ):
        report = hf_sparse.inspect(built)
        assert len(report.blocks) == 3
        assert all(type(b.activation).__name__ == "JSReLU" for b in report.blocks)


def test_bf16_and_sharded_checkpoints(tiny_model, input_ids, tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_activation_shared_with_a_mixer_is_not_called_stock(tiny_model, input_ids, tmp_path) -> None:
    """Bamba's hidden_act also drives its Mamba mixers, which a patch leaves as they are."""
    sizes = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
    model = tiny_model("bamba", **sizes)
    hf_sparse.patch(model, "relu")
    assert model.config.hidden_act == "hf_sparse"
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, expected)


def test_part_of_a_model_whose_blocks_differ_fails_loudly(tiny_model, input_ids, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="blocks=3 is not the number of MLP blocks"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    # An inner model may hold only some of the blocks of the outer one, so it cannot tell yet.
    part = AutoModel.from_pretrained(tmp_path, num_hidden_layers=2)
    with pytest.raises(RuntimeError, match="another number of MLP blocks"):
        part(input_ids)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation": "evil"}, "activation.name='evil'"),
        ({"format_version": 99}, "format_version=99"),
        ({"surprise": 1}, "surprise"),
        ({"certify": None}, "unknown fields in the config: certify"),
        ({"blocks": -1}, "blocks=-1"),
        ({"stock": {"field": "__class__", "activation": "silu"}}, "__class__"),
        ({"stock": {"field": "hidden_act", "activation": "os.system"}}, "os.system"),
        ({"stock": None}, "stock=None"),
    ],
)
def test_malformed_block_is_refused(tiny_model, tmp_path, change, named) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    path = Path(tmp_path, "config.json")
    config = json.loads(path.read_text())
    config["hf_sparse"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match='"hf_sparse" block of the model config') as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert named in str(error.value)


def test_uninstall_restores_transformers(tiny_model, tmp_path) -> None:
    from transformers import PreTrainedModel
    from transformers.activations import ACT2FN

    model = tiny_model("llama")
    hf_sparse.patch(model, "jsrelu")
    model.save_pretrained(tmp_path)
    names = ("post_init", "_initialize_weights", "save_pretrained", "_upload_modified_files")
    wrapped = {name: getattr(PreTrainedModel, name) for name in names}
    hf_sparse.uninstall()
    try:
        stock = {name: getattr(PreTrainedModel, name) for name in names}
        assert all(wrapped[name].__wrapped__ is stock[name] for name in names)
        assert "_upload_modified_files" not in vars(PreTrainedModel)  # inherited, as it was
        assert "hf_sparse" not in ACT2FN
        with pytest.raises(KeyError, match="hf_sparse"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        other = tiny_model("llama")
        hf_sparse.patch(other, "jsrelu")
        assert "hf_sparse" not in ACT2FN
    finally:
        hf_sparse.install()
    hf_sparse.install()
    assert all(getattr(PreTrainedModel, name).__wrapped__ is stock[name] for name in names)


def test_real_llama_round_trip(assets, tmp_path) -> None:
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(assets / "stories260K")
    text = (assets / "stories260K" / "greedy.txt").read_text()
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    hf_sparse.patch(model, "original")
    out = model.generate(prompt, max_new_tokens=100, do_sample=False)
    assert text.startswith(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    hf_sparse.patch(model, "jsrelu")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(out).logits, model(out).logits)
