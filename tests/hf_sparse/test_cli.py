"""The command line: help that names everything, work that agrees with the functions, errors in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.activations.config import ACTIVATIONS
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus
from hf_sparse.cli import main
from hf_sparse.launch import _with_recipe_path, application
from hf_sparse.texts import EMBEDDED, evaluation_texts
from triton_ops import BACKENDS

COMMANDS = (
    "patch",
    "calibrate",
    "finetune",
    "measure",
    "explain",
    "tune",
    "generate",
    "export",
    "push",
    "quickstart",
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hf_sparse.cli", *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)[:4]), encoding="utf-8")
    return path


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in said or f"\n    {name}\n" in said


@pytest.mark.slow
def test_an_error_as_a_process_is_one_line():
    result = command("measure", "./no-such-folder")
    assert result.returncode == 2
    assert result.stdout == ""
    # torchao has its own to say where it is imported.
    *others, line = result.stderr.splitlines()
    assert line == "hf-sparse: error: MODEL='./no-such-folder' is no folder."
    assert not any("Traceback" in one or "hf_sparse" in one for one in others)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "finetune"])
def test_help_of_each_command_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"example:\n  hf-sparse {name}" in capsys.readouterr().out


def test_choices_follow_the_library(capsys):
    with pytest.raises(SystemExit):
        main(["patch", "--help"])
    assert "{" + ",".join(ACTIVATIONS) + "}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "{" + ",".join(BACKENDS) + "}" in capsys.readouterr().out


def test_patch_saves_a_model_that_loads_patched(tmp_path, capsys):
    folder = tmp_path / "relu"
    assert (
        main(["patch", "tiny", "--activation", "fatrelu", "--threshold", "0.1", "--output", str(folder)]) == 0
    )
    assert "5 MLP blocks patched" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    hf_sparse.patch(expected, "fatrelu", threshold=0.1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert main(["patch", str(folder), "--output", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_patch_without_output_saves_nothing(capsys):
    assert main(["patch", "tiny", "--layers", "0", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 MLP blocks patched" in out
    assert "nothing was saved" in out
    assert main(["patch", "tiny", "--include", "*.[0-2].mlp", "*.4.mlp", "--exclude", "*.1.mlp"]) == 0
    assert "3 MLP blocks patched" in capsys.readouterr().out


def test_measure_writes_what_the_function_returns(tmp_path, text_file, capsys):
    json_file, plot = tmp_path / "r.json", tmp_path / "r.png"
    arguments = ["--text-file", str(text_file), "--max-tokens", "1000", "--sequence-length", "128"]
    assert main(["measure", "tiny", *arguments, "--json", str(json_file), "--plot", str(plot)]) == 0
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    texts = [p.strip() for p in text_file.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    report = hf_sparse.measure(model, texts, max_tokens=1000, sequence_length=128)
    written = json.loads(json_file.read_text())
    assert written["loss"] == pytest.approx(report.loss, rel=1e-6)
    assert written["tokens"] == report.tokens == 1000
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "all layers" in capsys.readouterr().out
    arguments += ["--metrics", "density", "union", "--json", str(json_file)]
    assert main(["measure", "tiny", *arguments]) == 0
    report = hf_sparse.measure(
        model, texts, max_tokens=1000, sequence_length=128, metrics=["density", "union"]
    )
    assert hf_sparse.SparsityReport.from_json(json_file).metrics == report.metrics
    assert str(report.metrics["union"]) in capsys.readouterr().out


@pytest.mark.slow
def test_measure_finds_what_can_be_left_out(tmp_path, capsys):
    json_file, html = tmp_path / "r.json", tmp_path / "r.html"
    sizes = ["--max-tokens", "256", "--sequence-length", "64"]
    files = ["--json", str(json_file), "--html", str(html)]
    assert main(["measure", "tiny", *sizes, "--cett-ppl", "20", *files]) == 0
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    texts = list(evaluation_texts(EMBEDDED))
    found = hf_sparse.cett_sparsity(model, texts, p=20, max_tokens=256, sequence_length=64)
    assert str(found) in capsys.readouterr().out
    assert json.loads(json_file.read_text())["cett_ppl"] == json.loads(json.dumps(found.to_dict()))
    assert hf_sparse.SparsityReport.from_json(json_file).tokens == 256
    assert f"{found.sparsity:.2%} of the neurons can be left out" in html.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_search_that_fails_leaves_the_measurement(tmp_path, capsys):
    """Not even without all its MLPs is the model so much worse."""
    json_file = tmp_path / "r.json"
    sizes = ["--max-tokens", "256", "--sequence-length", "64"]
    assert main(["measure", "tiny", *sizes, "--cett-ppl", "1e9", "--json", str(json_file)]) == 2
    said = capsys.readouterr()
    assert "and never by p=1e+09 %" in said.err
    assert "all layers" in said.out
    assert hf_sparse.SparsityReport.from_json(json_file).tokens == 256


def test_explain_writes_what_the_function_returns(tmp_path, text_file, capsys):
    json_file = tmp_path / "why.json"
    arguments = ["--text-file", str(text_file), "--max-tokens", "256", "--sequence-length", "64"]
    assert main(["explain", "tiny", *arguments, "--json", str(json_file)]) == 0
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    texts = [p.strip() for p in text_file.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    report = hf_sparse.explain(model, texts, max_tokens=256, sequence_length=64)
    written = json.loads(json_file.read_text())
    assert written["tokens"] == report.tokens == 256
    found = [layer["key_flatness"] for layer in written["layers"]]
    assert found == pytest.approx([layer.key_flatness for layer in report.layers], rel=1e-4)
    assert "exact: density = AF_K / (T n C)" in capsys.readouterr().out


@pytest.mark.slow
def test_measure_reads_a_dataset(tmp_path):
    """The validation split of a folder, and the whole of a single file; here both are the embedded text."""
    folder = python_corpus().write(tmp_path / "text")
    sources = {"folder": folder, "file": folder / "validation.jsonl", "embedded": "tiny"}
    found = set()
    for name, source in sources.items():
        path = tmp_path / f"{name}.json"
        assert (
            main(["measure", "tiny", "--dataset", str(source), "--max-tokens", "600", "--json", str(path)])
            == 0
        )
        found.add(path.read_text())
    assert len(found) == 1


def test_calibrate_saves_what_the_function_makes(tmp_path, capsys):
    arguments = ["--target-sparsity", "0.4", "--max-tokens", "600", "--sequence-length", "64"]
    report, output = tmp_path / "report.json", tmp_path / "teal"
    assert main(["calibrate", "tiny", *arguments, "--json", str(report), "--output", str(output)]) == 0
    assert "teal: sparsity" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(output)
    expected = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    texts = [text for _, text in zip(range(20), python_corpus().train, strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    options = {"tokenizer": tokenizer, "max_tokens": 600, "sequence_length": 64}
    hf_sparse.calibrate(expected, texts, target_sparsity=0.4, **options)
    found = hf_sparse.inspect(loaded).config
    assert found == hf_sparse.inspect(expected).config
    assert json.loads(report.read_text())["config"] == found.to_dict()
    assert main(["calibrate", "tiny", *arguments[:2], "--output", str(output)]) == 2  # it is not empty
    with pytest.raises(SystemExit):
        main(["calibrate", "tiny"])


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_generate_is_greedy_and_the_same_on_every_backend(tmp_path, backend, capsys):
    main(["patch", "tiny", "--output", str(tmp_path / "relu")])
    capsys.readouterr()
    arguments = ["--prompt", "Return the", "--max-new-tokens", "12"]
    assert main(["generate", str(tmp_path / "relu"), *arguments, "--backend", backend]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Return the")
    assert "12 tokens in" in captured.err
    assert main(["generate", str(tmp_path / "relu"), *arguments]) == 0
    assert capsys.readouterr().out == captured.out


def test_generate_with_a_certificate_says_the_same(tmp_path, capsys):
    main(["patch", "tiny", "--output", str(tmp_path / "relu")])
    capsys.readouterr()
    arguments = ["generate", str(tmp_path / "relu"), "--prompt", "Return the", "--max-new-tokens", "8"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert main([*arguments, "--certify"]) == 0
    assert capsys.readouterr().out == said
    assert main(["generate", "tiny", *arguments[2:], "--certify"]) == 2
    assert "is not patched" in capsys.readouterr().err


def test_options_are_written_with_dashes(capsys):
    for name in COMMANDS:
        if name == "finetune":  # has the help of the training application
            continue
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert not re.findall(r"--\w+_\w+", capsys.readouterr().out)


def test_generate_samples_by_seed(capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(
            [
                "generate",
                "tiny",
                "--prompt",
                "The",
                "--max-new-tokens",
                "20",
                "--temperature",
                "1",
                "--seed",
                seed,
            ]
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", "tiny", "--threshold", "0.5"], "use 'fatrelu'"),
        (["patch", "tiny", "--layers", "9"], "names block 9"),
        (["patch", "tiny", "--include", "layers.0"], "include='layers.0' matches no MLP block"),
        (["patch", "tiny", "--part", "vision"], "part='vision' is no part of this LlamaForCausalLM"),
        (["measure", "tiny", "--text-file", "no-such.txt"], "No such file"),
        (["measure", "tiny", "--dataset", "./nowhere"], "dataset='./nowhere' does not exist"),
        (["measure", "tiny", "--sequence-length", "9999"], "longer than the model's context"),
        (["measure", "tiny", "--max-tokens", "0"], "max_tokens=0"),
        (["generate", "tiny", "--prompt", ""], "--prompt has no tokens"),
        (["generate", "tiny", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["quickstart", "--output", __file__], "is there and not empty"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith("hf-sparse: error: ")
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HF_SPARSE_DEBUG", "1")
    with pytest.raises(ValueError, match="max_tokens"):
        main(["measure", "tiny", "--max-tokens", "0"])


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["measure", "tiny", "--unknown"], ["patch"]])
def test_misspelt_command_lines_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: hf-sparse" in capsys.readouterr().err


@pytest.mark.slow
def test_finetune_help_is_the_training_applications(capfd):
    assert main(["finetune", "--help"]) == 0
    out = capfd.readouterr().out
    assert "hf-sparse finetune --config prosparse" in out
    assert "--learning-rate" in out
    assert "--learning_rate" not in out


@pytest.mark.slow
def test_finetune_passes_mistakes_on(capfd):
    for option in ("--learning-rate", "--learning_rate"):  # the latter is how a recipe file writes it
        assert main(["finetune", option, "-1"]) != 0
        assert "learning_rate=-1.0 cannot be used" in capfd.readouterr().err


def test_a_shipped_recipe_needs_no_path(tmp_path, monkeypatch):
    recipes = application() / "recipes"
    shipped = str(recipes / "relu.yaml")
    assert _with_recipe_path(["--config", "relu", "--model", "relu"], recipes) == [
        *("--config", shipped),
        *("--model", "relu"),
    ]
    assert _with_recipe_path(["--config=relu"], recipes) == [f"--config={shipped}"]
    assert _with_recipe_path(["--config", "mine.yaml"], recipes) == ["--config", "mine.yaml"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relu").write_text("activation: relu\n")
    assert _with_recipe_path(["--config", "relu"], recipes) == ["--config", "relu"]
