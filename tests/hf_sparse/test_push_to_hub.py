"""hf_sparse.push_to_hub: the model, its card and nothing else, over HTTP against a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from support.loopback_hub import LoopbackHub

TESTS = str(Path(__file__).parents[1])

AUTHOR = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus
from support.composites import composite
from support.models import tiny

torch.set_num_threads(1)
torch.manual_seed(0)
out, texts = sys.argv[2], ["The list of the names of the module. " * 9, "Return the text of the widget. " * 9]
model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_MODEL), AutoTokenizer.from_pretrained(TINY_MODEL)
lengths = dict(tokenizer=tokenizer, sequence_length=32)
before = hf_sparse.measure(model, texts, **lengths)
hf_sparse.patch(model, "relu")
report = hf_sparse.measure(model, texts, **lengths)
said = {"before": before.to_dict(), "report": report.to_dict()}
everything = dict(
    tokenizer=tokenizer, report=report, before=before, evaluated_on="allenai/c4", speed="2.1x, one machine",
    recipe={"patch": "relu", "model": "someone/dense", "dataset": "allenai/c4", "methods": {"l1": {}}},
)
said["url"] = hf_sparse.push_to_hub(model, "me/relu", **everything, private=True)
hf_sparse.push_to_hub(model, "me/relu", revision="wip", commit_message="On a branch")
commits = [hf_sparse.push_to_hub(model, "me/twice", **everything).oid for _ in range(2)]
said["commits"] = commits

readme = b"---\\nlicense: mit  # mine\\ntags: [mine, jsrelu]\\n---\\r\\n# Caf\\xc3\\xa9\\r\\n\\nMine.\\n"
api = HfApi()
api.create_repo("me/mine")
there = {"README.md": readme, "model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
for name, content in there.items():
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="me/mine")
hf_sparse.push_to_hub(model, "me/mine", **everything)
model.push_to_hub("me/plainly")
hf_sparse.push_to_hub(model, "me/plainly", report=report)
model.push_to_hub("me/plainly")
hf_sparse.push_to_hub(model, "me/repatched", **everything)
hf_sparse.patch(model, "fatrelu", threshold=0.5)
model.push_to_hub("me/repatched")

ids, zeroth = torch.randint(3, 100, (2, 17)), {"zeroth_bias": {"positions": 9}}
for name, kind in (("mixtral", "mixtral"), ("jsrelu", "llama"), ("bloom", "bloom"), ("zeroth", "gpt2")):
    other = tiny(kind)
    hf_sparse.patch(other, "relu" if name != "jsrelu" else name, **zeroth if name == "zeroth" else {})
    for parameter in other.parameters():
        if tuple(parameter.shape) == (9, 32):
            torch.nn.init.normal_(parameter)
    hf_sparse.push_to_hub(other, f"me/{name}")
    torch.save([ids, other(ids).logits], f"{out}/{name}.pt")
gemma = composite("gemma3")
hf_sparse.patch(gemma, "relu")
hf_sparse.patch(gemma, "fatrelu", threshold=0.1, part="vision")
hf_sparse.push_to_hub(gemma, "me/gemma3", report=hf_sparse.measure(gemma, [{"input_ids": ids}]))
torch.save([ids, gemma(ids).logits], f"{out}/gemma3.pt")
tokens = tokenizer(texts[0], return_tensors="pt")["input_ids"]
hf_sparse.patch(model, "relu")
torch.save([tokens, model(tokens).logits], f"{out}/relu.pt")
again = AutoModelForCausalLM.from_pretrained("me/twice")
hf_sparse.push_to_hub(again, "me/next")
hf_sparse.push_to_hub(again, "me/twice")
again.save_pretrained(f"{out}/saved")
hf_sparse.push_to_hub(AutoModelForCausalLM.from_pretrained(f"{out}/saved"), "me/local")
print(json.dumps(said))
"""
LOAD = """
import sys
if sys.argv[1] == "sparse":
    import hf_sparse
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
torch.set_num_threads(1)
for name in sys.argv[3:]:
    ids, expected = torch.load(f"{sys.argv[2]}/{name}.pt")
    auto = AutoModelForImageTextToText if name == "gemma3" else AutoModelForCausalLM
    try:
        model = auto.from_pretrained(f"me/{name}").eval()
    except (KeyError, ValueError) as refused:
        print(name, "refused", type(refused).__name__, refused)
        continue
    with torch.no_grad():
        print(name, "equal" if torch.equal(model(ids).logits, expected) else "differs")
if "relu" in sys.argv[3:]:
    print(AutoTokenizer.from_pretrained("me/relu")("Return the text").input_ids)
    AutoModelForCausalLM.from_pretrained("me/relu", revision="wip")
"""
LOADED = ("relu", "jsrelu", "mixtral", "bloom", "gemma3", "zeroth")


class Shelf:
    """What one author pushed, and what strangers then made of it, with the package and without."""

    def __init__(self, folder: Path) -> None:
        with LoopbackHub() as hub:
            out = hub.run(AUTHOR, TESTS, str(folder), home=folder / "author")
            self.said = json.loads(out.splitlines()[-1])
            self.loaded = hub.run(LOAD, "sparse", str(folder), *LOADED, home=folder / "user")
            self.plainly = hub.run(LOAD, "plain", str(folder), *LOADED, home=folder / "other")
        self.hub = hub

    def files(self, name: str) -> dict[str, bytes]:
        return self.hub.repositories[f"me/{name}"]

    def card(self, name: str) -> ModelCard:
        return ModelCard(self.files(name)["README.md"].decode())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


pytestmark = pytest.mark.slow


def test_what_is_pushed_comes_back_in_a_fresh_process(shelf) -> None:
    for name in LOADED:
        assert f"{name} equal" in shelf.loaded
    ids = AutoTokenizer.from_pretrained(TINY_MODEL)("Return the text").input_ids
    assert str(ids) in shelf.loaded
    assert "tokenizer.json" in shelf.files("relu")
    assert not any(name.endswith((".bin", ".py", ".pt")) for name in shelf.files("relu"))


def test_the_card_says_of_plain_transformers_what_it_does(shelf) -> None:
    assert "relu equal" in shelf.plainly
    assert "mixtral equal" in shelf.plainly
    assert "jsrelu refused KeyError 'hf_sparse'" in shelf.plainly
    assert "gemma3 refused KeyError 'hf_sparse'" in shelf.plainly
    assert "bloom refused ValueError Unknown fusion type: hf_sparse" in shelf.plainly
    for name in LOADED:
        works = f"{name} equal" in shelf.plainly
        assert ("transformers loads it as well" in shelf.card(name).text) == works
        assert ("transformers refuses to load it" in shelf.card(name).text) == (not works and name != "bloom")
    assert "from version 5 on refuses to load it: `ValueError: Unknown fusion" in shelf.card("bloom").text
    assert "Transformers 4 loads it: **wrong without an error**" in shelf.card("bloom").text


def test_the_metadata_are_of_the_hubs_form(shelf) -> None:
    card = shelf.card("relu")
    card.data.to_yaml()
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["hf_sparse", "activation-sparsity", "relu"]
    assert card.data.base_model == "someone/dense"
    assert card.data.datasets == ["allenai/c4"]
    assert card.data.license is None
    assert card.data.model_name == "relu"
    found = {result.metric_type: result for result in card.data.eval_results}
    report = shelf.said["report"]
    assert found["perplexity"].metric_value == pytest.approx(report["perplexity"], rel=1e-6)
    assert found["activation_sparsity"].metric_value == pytest.approx(report["sparsity"], abs=1e-6)
    assert {result.dataset_type for result in found.values()} == {"allenai/c4"}
    assert shelf.card("mixtral").data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_sparse", "activation-sparsity", "relu"],
    }
    assert shelf.card("gemma3").data.pipeline_tag == "image-text-to-text"
    assert shelf.card("gemma3").data.tags == ["hf_sparse", "activation-sparsity", "fatrelu", "relu"]
    assert "POST /api/validate-yaml" in shelf.hub.requests


def test_the_card_tells_what_was_measured_and_no_more(shelf) -> None:
    text, report, before = shelf.card("relu").text, shelf.said["report"], shelf.said["before"]
    assert f"| perplexity | {before['perplexity']:.4g} | {report['perplexity']:.4g} |" in text
    assert f"| sparsity | {before['sparsity']:.2%} | {report['sparsity']:.2%} |" in text
    assert "on allenai/c4, in windows of 32 tokens" in text
    for layer in report["layers"]:
        assert f"| `{layer['name']}` | {layer['neurons']:,} | 0.00% | {layer['sparsity']:.2%} |" in text
    assert "Speed: 2.1x, one machine" in text
    assert "methods:" in text
    assert "It derives from `someone/dense`." in text
    assert "Not measured" not in text
    bare = shelf.card("mixtral").text
    assert "Not measured: sparsity, perplexity, speed." in bare
    assert bare.count("ot measured") == 1
    assert "derives" not in bare
    assert "## Training" not in bare
    assert "on text that the author did not name" in shelf.card("gemma3").text


def test_its_code_runs(shelf, tmp_path) -> None:
    with_it, without = code(shelf.card("relu").text)
    assert with_it.startswith("import hf_sparse")
    assert "hf_sparse" not in without
    assert len(code(shelf.card("gemma3").text)) == 1
    with LoopbackHub() as hub:
        hub.repositories |= shelf.hub.repositories
        said = hub.run(with_it + "\nassert hf_sparse.inspect(model).config", home=tmp_path / "user")
        assert hub.run(without, home=tmp_path / "other") == said


def code(text: str) -> list[str]:
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def test_every_patched_part_is_named(shelf) -> None:
    text = shelf.card("gemma3").text
    assert "3 MLP blocks of the part `text`" in text
    assert "compute `relu` in place of `gelu_pytorch_tanh`" in text
    assert "2 MLP blocks of the part `vision`" in text
    assert "compute `fatrelu (threshold 0.1)`" in text


def test_a_branch_leaves_the_main_one_alone(shelf) -> None:
    branch = shelf.files("relu@wip")
    assert "POST /api/models/me/relu/branch/wip" in shelf.hub.requests
    assert branch["model.safetensors"] == shelf.files("relu")["model.safetensors"]
    assert b'revision="wip"' in branch["README.md"]
    assert b'revision="wip"' not in shelf.files("relu")["README.md"]


def test_private_is_passed_on_and_the_url_returned(shelf) -> None:
    assert shelf.hub.private["me/relu"] == "private"
    assert shelf.hub.private["me/twice"] is None
    assert shelf.said["url"] == f"{shelf.hub.endpoint}/me/relu/commit/{shelf.said['url'].rpartition('/')[2]}"


def test_pushing_the_same_twice_changes_nothing(shelf) -> None:
    first, second = shelf.said["commits"]
    assert first == second
    assert shelf.files("twice")["README.md"].count(b"## Measured") == 1


def test_the_base_model_is_what_was_loaded_from_the_hub_and_no_folder(shelf) -> None:
    assert shelf.card("next").data.base_model == "me/twice"
    assert shelf.card("twice").data.base_model == "someone/dense"  # and not itself
    assert shelf.card("local").data.base_model is None


def test_of_a_readme_on_the_hub_what_is_not_ours_stays(shelf) -> None:
    readme = shelf.files("mine")["README.md"]
    assert b"license: mit  # mine\n" in readme
    assert b"# Caf\xc3\xa9\r\n\nMine.\n" in readme
    data = shelf.card("mine").data
    assert data.license == "mit"
    assert data.tags == ["mine", "hf_sparse", "activation-sparsity", "relu"]  # jsrelu it is not
    assert data.base_model == "someone/dense"


def test_old_weights_that_would_be_loaded_in_place_of_the_new_ones_go(shelf) -> None:
    files = shelf.files("mine")
    assert files["notes.txt"] == b"mine"
    assert "model.safetensors" in files
    assert "model-00001-of-00002.safetensors" not in files


def test_both_ways_to_push_keep_what_the_other_wrote(shelf) -> None:
    readme = shelf.files("plainly")["README.md"]
    for once in (b"## Measured", b"## Sparse activations", b"## How to load it", b"push_to_hub: begin"):
        assert readme.count(once) == 1
    assert b"Model Card" in readme  # of transformers, as it pushed first


def test_another_patch_takes_the_measurements_of_the_old_one_out(shelf) -> None:
    text, data = shelf.card("repatched").text, shelf.card("repatched").data
    assert "fatrelu (threshold 0.5)" in text
    assert "## Measured" not in text
    assert not data.eval_results
    assert "relu" not in data.tags
    assert data.base_model == "someone/dense"


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, hf_sparse
from huggingface_hub import HfApi
from support.models import tiny
model = tiny("llama")
hf_sparse.patch(model, "relu")
model.save_pretrained(sys.argv[2])  # which writes class and dtype into the config, as ever
ids = torch.arange(3, 20)[None]
before, config = model(ids).logits, model.config.to_dict()
for _ in range(3):
    try:
        hf_sparse.push_to_hub(model, "me/cut")
    except ConnectionError as error:
        print(type(error).__name__, error)
    print(sorted(HfApi().list_repo_files("me/cut")))
    assert torch.equal(model(ids).logits, before)
    assert model.config.to_dict() == config
"""


def test_an_interrupted_push_leaves_nothing_and_the_next_completes_it(tmp_path) -> None:
    with LoopbackHub() as hub:
        hub.cut = {"/upload/": 6, "/commit/": 1}  # huggingface_hub tries an upload six times
        said = hub.run(INTERRUPTED, TESTS, str(tmp_path / "saved"), home=tmp_path)
        lines = said.splitlines()[-5:]  # DeepSpeed, where it is installed, says something when it is imported
        assert hub.cut == {"/upload/": 0, "/commit/": 0}
    for error, files in (lines[:2], lines[2:4]):
        assert error.startswith("ConnectionError the push to 'me/cut' was interrupted")
        assert "call push_to_hub again" in error
        assert files == "[]"
    assert lines[4:] == [str(["README.md", "config.json", "generation_config.json", "model.safetensors"])]


WRONG_TOKEN = """
import sys
sys.path.insert(0, sys.argv[1])
import hf_sparse
from huggingface_hub.errors import HfHubHTTPError
from support.models import tiny
model = tiny("llama")
hf_sparse.patch(model, "relu")
for token in ("hf_wrong", "hf_loopback_read"):
    try:
        hf_sparse.push_to_hub(model, "someone/model", token=token)
    except HfHubHTTPError as error:
        print(error.response.status_code, " ".join(str(error).split()))
"""


def test_the_hubs_own_error_for_a_wrong_token_names_the_repository_and_the_mend(tmp_path) -> None:
    with LoopbackHub() as hub:
        wrong, reading = hub.run(WRONG_TOKEN, TESTS, home=tmp_path).splitlines()
        assert not hub.repositories
        assert not any(request.startswith("PUT") for request in hub.requests)
    assert wrong.startswith("401")
    assert "Invalid username or password" in wrong
    assert reading.startswith("403")
    assert "You don't have the rights" in reading
    for said in (wrong, reading):
        assert "Pushing to 'someone/model' needs a token that may write there: `hf auth login`" in said


def test_the_command_pushes_what_measure_wrote(tmp_path) -> None:
    folder, report = tmp_path / "relu", tmp_path / "after.json"
    model, tokenizer = (auto.from_pretrained(TINY_MODEL) for auto in (AutoModelForCausalLM, AutoTokenizer))
    hf_sparse.patch(model, "relu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = hf_sparse.measure(model, ["Return the text of it. " * 9], tokenizer=tokenizer)
    measured.to_json(report)
    with LoopbackHub() as hub:
        command = [sys.executable, "-m", "hf_sparse.cli", "push", str(folder), "me/relu"]
        options = ["--report", str(report), "--evaluated-on", "x/y", "--private", "--datasets", "a/b", "c/d"]
        env = {**os.environ, **hub.environment(tmp_path / "home")}
        done = subprocess.run([*command, *options], env=env, capture_output=True, text=True, check=True)
        assert f"pushed: {hub.endpoint}/me/relu/commit/" in done.stdout
        files = hub.repositories["me/relu"]
        assert hub.private == {"me/relu": "private"}
        wrong = {**env, "HF_TOKEN": "hf_wrong"}
        refused = subprocess.run(command, env=wrong, capture_output=True, text=True, check=False)
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["a/b", "c/d"]
    assert card.data.base_model is None  # a folder is no id
    assert card.data.eval_results[0].metric_value == pytest.approx(measured.perplexity, rel=1e-6)
    assert "tokenizer.json" in files
    assert refused.returncode == 2
    assert "hf-sparse: error:" in refused.stderr
    assert "needs a token that may write there" in refused.stderr
