"""push_to_hub: a patched model and its whole model card go to the Hub, in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from hf_sparse._version import __version__
from hf_sparse.errors import PatchError
from hf_sparse.hub_card import full_card
from hf_sparse.hub_facts import Facts
from hf_sparse.metrics import SparsityReport
from hf_sparse.model_card import write_model_card
from hf_sparse.patch_report import PatchReport
from hf_sparse.patching import inspect, transformers_model
from hf_sparse.training_facts import with_facts
from hf_sparse.tuning import TuneReport

_WEIGHTS = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
]
"""Weights that ``from_pretrained`` may choose: those of an earlier push must not be left beside ours."""

_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
"""Of the http client that huggingface_hub uses, whichever that is: also for lost connections."""


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: Any = None,
    report: SparsityReport | None = None,
    before: SparsityReport | None = None,
    evaluated_on: str | None = None,
    speed: str | TuneReport | None = None,
    recipe: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push a patched model to the Hub with a model card that says what it is and what was measured.

    The model, the tokenizer and the README are one commit: an interrupted push leaves the repository as it
    was, and the next one completes it. ``from_pretrained`` gives the patched model back after ``import
    hf_sparse``. The card says what follows from the model (what was patched, how to load it, which runtimes
    compute something else) and what is given here; nothing else is claimed. Of a README that is there only
    marked sections and our metadata change. Files of weights of an earlier push, which would be loaded in
    the place of these, are removed by the commit. What training/finetune.py made, loaded from its folder and
    unchanged, brings its report, the one before, evaluated_on, the recipe and datasets along where None is
    given.

    Args:
        model: a patched model of transformers, with all its weights in this process.
        repo_id: ``"me/model"``, or ``"model"`` for the owner of the token; made if it is not there.
        tokenizer: pushed along, if given; or a processor.
        report: what :func:`hf_sparse.measure` gave for this model: sparsity by layer, and perplexity.
        before: the same of the dense model, on the same text.
        evaluated_on: the text of ``report``: the id of a data set, or words. With it the perplexity is in the
            metadata, too, where the Hub shows it.
        speed: what was measured, in words with the conditions, or what :func:`hf_sparse.tune` gave.
        recipe: of the training, as fields or as the path of a YAML file; it is in the card as it is.
        base_model: the Hub id of the model that this one was made from. None takes it from the recipe, or
            from where the model was loaded if that was the Hub.
        datasets: Hub ids of what it was trained on. None takes that of the recipe, if it is one.
        revision: the branch; made if it is not there. None means the main one.
        private: for a repository that is made now; None leaves it to the Hub.
        token: to write with; None takes the one of ``hf auth login`` or ``HF_TOKEN``.
        commit_message: None says what is uploaded.
        create_pr: propose the commit to the owners of the repository.

    Returns:
        the URL of the commit, with more about it in its fields, such as ``oid`` and ``pr_url``.

    Raises:
        PatchError: the model is not patched, or is wrapped by an adapter.
        ValueError: an argument is not what it should be; nothing was sent.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, such as for a wrong token.
        ConnectionError: the connection was lost.

    """
    base, patched = _require_patched(model)
    validate_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"create_pr=True makes a branch of its own; leave out revision={revision!r}.")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(f"tokenizer={tokenizer!r} has no save_pretrained; give the object, not its name.")
    given = {
        "report": report,
        "before": before,
        "evaluated_on": evaluated_on,
        "speed": speed,
        "recipe": recipe,
        "base_model": base_model,
        "datasets": datasets,
    }
    facts = Facts.read(base, **with_facts(base, given))
    api = HfApi(token=token, library_name="hf_sparse", library_version=__version__)
    with _explained(repo_id):  # before anything large is written
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        readme = _readme(repo_id, revision, token)
    if readme is None:
        readme = f"# {repo_id.rpartition('/')[2]}\n".encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "README.md")
        path.write_bytes(readme)
        base.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_model_card(base, folder)  # saving did so already, unless hf_sparse is uninstalled
        card = full_card(
            path.read_bytes().decode("utf-8", "surrogateescape"),
            base,
            patched,
            facts,
            repo_id=repo_id,
            revision=None if revision == "main" else revision,
            tokenizer=tokenizer,
        )
        path.write_bytes(card.encode("utf-8", "surrogateescape"))
        with _explained(repo_id):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or f"Upload {type(base).__name__}, patched with hf_sparse",
                create_pr=create_pr,
                delete_patterns=_WEIGHTS,
            )


def _require_patched(model: nn.Module) -> tuple[PreTrainedModel, PatchReport]:
    base = transformers_model(model)
    if base is not model or getattr(base, "_hf_peft_config_loaded", False):
        raise PatchError(
            "this model has an adapter of PEFT, and push_to_hub pushes whole models. Merge it first "
            "(model = model.merge_and_unload()), or push the adapter alone with model.push_to_hub(...)."
        )
    report = inspect(base)
    if not report.patched:
        raise PatchError(
            f"this {type(base).__name__} is not patched, so there is nothing that a card of hf_sparse could "
            "say. hf_sparse.patch(model, ...) patches it; model.push_to_hub(...) pushes it as it is."
        )
    return base, report


def _readme(repo_id: str, revision: str | None, token: str | bool | None) -> bytes | None:
    try:
        # Never one of the cache: what somebody wrote since would be lost.
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=token, force_download=True)
    except LocalEntryNotFoundError:  # which is an EntryNotFoundError, and means that the Hub was not reached
        raise
    except EntryNotFoundError:
        return None
    return Path(path).read_bytes()


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the connection say what was being done, and what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            error.append_to_message(
                f"\nPushing to {repo_id!r} needs a token that may write there: `hf auth login`, HF_TOKEN, or "
                "token=."
            )
        else:
            error.append_to_message(f"\nThis was a push to {repo_id!r}, which has all of it or nothing.")
        raise
    except (RuntimeError, LocalEntryNotFoundError, _HTTP_ERROR) as error:
        reason = error.__cause__ or error
        raise ConnectionError(
            f"the push to {repo_id!r} was interrupted ({type(reason).__name__}: {reason}). All files are one "
            "commit, so the repository has all of them or none, and the model here is as it was: call "
            "push_to_hub again."
        ) from error
