"""tune: measured on this machine, kept, and obeyed by the blocks."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.cli import main
from support.backends import change_backend
from support.compiler import needs_compiler
from support.skips import CountSkips
from triton_ops import Problem, break_even
from triton_ops.problem import Form
from triton_ops.tune import available

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def backend() -> str:
    """The best one that runs here."""
    return available("cpu", torch.float32)


def skips(model, tokens: int = 1) -> int:
    """How many blocks skip for this many tokens under the automatic choice."""
    with torch.no_grad(), CountSkips() as counter:
        model(torch.ones(1, tokens, dtype=torch.int64), use_cache=False)
    return counter.count


def problem(form: Form, *, certified: bool = False) -> Problem:
    """Of the blocks of a tiny model."""
    return Problem(form, 32, 88, torch.float32, "cpu", certified)


def stored(backend: str, form: Form, *limits: float, certified: bool = False) -> None:
    """As measured for up to 32 tokens: "never" where no limit is given."""
    never = () if certified else (0.0,) * (32 - len(limits))
    break_even.store(backend, problem(form, certified=certified), limits + never)


@pytest.mark.parametrize(("name", "forms"), [("llama", ["gated"]), ("gpt_neox", ["linear", "plain"])])
def test_every_shape_is_measured_once_and_kept(tiny_model, backend, name, forms) -> None:
    model = tiny_model(name)
    hf_sparse.patch(model, "relu")
    report = hf_sparse.tune(model, tokens=(1, 3))
    assert sorted(m.problem.form for m in report.measurements) == forms
    assert all(list(m.dense_ms) == [1, 3] for m in report.measurements)
    for m in report.measurements:
        assert m.problem == problem(m.problem.form)
        assert break_even.measured(backend, m.problem) == m.break_even
    assert len(report.layers) == 3
    assert report.layers[0].name == hf_sparse.inspect(model).blocks[0].name
    assert hf_sparse.tune(model, tokens=(1, 3)).measurements == ()
    forced = hf_sparse.tune(model, tokens=(1,), force=True).measurements
    assert sorted(m.problem.form for m in forced) == forms


@needs_compiler
@pytest.mark.parametrize("multiplies", [False, True])
def test_more_tokens_than_measured_skip_as_the_most_did_if_that_is_built_in(
    tiny_model, monkeypatch, multiplies
) -> None:
    change_backend(monkeypatch, "cpp", multiplies=lambda dtype: multiplies)
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    blocks = [block.module for block in hf_sparse.inspect(model).blocks]
    blocks[0].density, blocks[1].density, blocks[2].density = 0.2, 0.3, 1.0
    stored("cpp", "gated", *[1.0] * 31, 0.25)
    assert skips(model, 40) == (1 if multiplies else 0)
    layers = hf_sparse.tune(model).layers
    assert [layer.skips(40) for layer in layers] == [multiplies, False, False]
    assert [layer.choice for layer in layers] == [
        "skips at 1-32 and more" if multiplies else "skips at 1-32",
        "skips at 1-31",
        "skips at 1-31",
    ]


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_model_that_certifies_has_that_measured_too(tiny_model, name) -> None:
    model = tiny_model(name)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, certify=True)
    report = hf_sparse.tune(model, tokens=(1,))
    (certified,) = [m for m in report.measurements if m.problem.certified]
    assert certified.problem.form == ("gated" if name == "llama" else "plain")
    assert all(layer.certified == max(certified.break_even, default=0.0) for layer in report.layers)


def test_a_dataset_gives_every_block_its_density(tiny_model, input_ids, backend) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "shifted_relu", shift=0.2, layers=(0, 2))
    stored(backend, "gated", 0.5)
    data = [{"input_ids": input_ids}]
    report = hf_sparse.tune(model, data)
    layers = hf_sparse.measure(model, data).layers
    expected = [layers[0].density, layers[2].density]
    assert [layer.density for layer in report.layers] == expected
    assert [block.module.density for block in hf_sparse.inspect(model).blocks] == expected
    assert 0 < expected[0] < 0.6
    # Without data what is known stays.
    assert [layer.density for layer in hf_sparse.tune(model).layers] == expected


@pytest.mark.parametrize(
    ("name", "form"), [("llama", "gated"), ("gpt_neox", "plain"), ("gpt_neox", "linear")]
)
def test_each_block_follows_its_own_density(tiny_model, backend, name, form) -> None:
    model = tiny_model(name)
    hf_sparse.patch(model, "relu")
    for other in ("plain", "linear"):
        stored(backend, other)
    stored(backend, form, 1.0, 0.5)
    blocks = [block.module for block in hf_sparse.inspect(model).blocks]
    assert (skips(model, 1), skips(model, 2), skips(model, 3)) == (3, 0, 0)
    blocks[0].density, blocks[1].density = 0.5, 0.51
    assert (skips(model, 1), skips(model, 2), skips(model, 3)) == (3, 1, 0)
    report = hf_sparse.tune(model)
    assert report.measurements == ()
    assert [[layer.skips(n) for n in (1, 2, 3)] for layer in report.layers] == [
        [True, True, False],
        [True, False, False],
        [True, False, False],
    ]
    assert [layer.choice for layer in report.layers] == ["skips at 1-2", "skips at 1", "skips at 1"]


@needs_compiler
def test_a_certificate_is_used_up_to_its_break_even(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, certify=True)
    stored("cpp", "gated", 0.5)
    stored("cpp", "gated", 0.2, certified=True)
    blocks = [block.module for block in hf_sparse.inspect(model).blocks]
    blocks[0].density, blocks[1].density = 0.2, 0.21  # the third is unknown: it was asked to certify
    with torch.no_grad(), CountSkips() as counter:
        model(torch.ones(1, 1, dtype=torch.int64), use_cache=False)
    assert (counter.count, counter.certified) == (3, 2)
    choices = [layer.choice for layer in hf_sparse.tune(model).layers]
    assert choices == [
        "skips at 1; certified at 1",
        "skips at 1; the certificate pays up to 20%",
        "skips at 1; certified at 1",
    ]


def test_the_table(tiny_model, backend) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    stored(backend, "gated", 1.0, 0.3, 0.3, 0.3)
    hf_sparse.inspect(model).blocks[0].module.density = 0.125
    lines = str(hf_sparse.tune(model)).splitlines()
    assert lines[0].split()[:2] == ["layer", "shape"]
    assert lines[2].split() == [
        *("model.layers.0.mlp", "32", "x", "88", "float32", "gated", "12.5%"),
        *("100%", "30%", "30%", "0%", "0%", "0%", "skips", "at", "1-4"),
    ]
    assert lines[3].split()[6] == "?"
    assert "unknown density counts as 100 %" in lines[-1]


def test_blocks_that_cannot_skip_say_why(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "original")
    report = hf_sparse.tune(model)
    assert report.measurements == ()
    assert {layer.choice for layer in report.layers} == {
        "dense: its activation is not exactly zero, or has a hook"
    }
    hf_sparse.patch(model, "relu")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    report = hf_sparse.tune(wrapped)
    assert report.measurements == ()
    assert all("its linear layers must be called" in layer.choice for layer in report.layers)


def test_a_dtype_without_a_kernel_is_dense(tiny_model) -> None:
    model = tiny_model("llama").double()
    hf_sparse.patch(model, "relu")
    report = hf_sparse.tune(model)
    assert all("nothing to measure for torch.float64 on cpu" in layer.choice for layer in report.layers)


def test_only_the_part_that_can_be_read_is_measured(tiny_model) -> None:
    model = tiny_model("gpt_neox")
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, certify=True, linears=False)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["dense_h_to_4h"], task_type="CAUSAL_LM"))
    report = hf_sparse.tune(wrapped, tokens=(1,))
    assert [m.problem for m in report.measurements] == [problem("linear")]


def test_mistakes(tiny_model) -> None:
    model = tiny_model("llama")
    with pytest.raises(PatchError, match="tune needs a patched model; this LlamaForCausalLM is not patched"):
        hf_sparse.tune(model)
    hf_sparse.patch(model, "relu")
    for tokens in ((), (0, 1)):
        with pytest.raises(ValueError, match="is not a sequence of numbers of at least 1"):
            hf_sparse.tune(model, tokens=tokens)


@pytest.mark.slow
def test_the_command(tmp_path, capsys) -> None:
    folder = str(tmp_path / "relu")
    assert main(["patch", "tiny", "--output", folder]) == 0
    assert main(["tune", folder, "--certify", "--dataset", "tiny", "--max-tokens", "600"]) == 0
    out = capsys.readouterr().out
    assert out.count(".mlp ") == 5
    assert "?" not in out  # the density was measured
    assert main(["tune", "tiny"]) == 2
    assert "tune needs a patched model" in capsys.readouterr().err
