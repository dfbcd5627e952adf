"""Every registered model type, tiny: patched and all that follows, or refused, as docs/coverage.md says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

import hf_sparse
from coverage_page import PAGE, page
from hf_sparse import PatchError
from hf_sparse.adapters import Block
from hf_sparse.adapters.roles import LayerRoles
from support.compiler import CPP
from support.coverage import Coverage, coverage
from support.every_type import NOT_BUILT, ModelType, model_types
from support.inventory import ffns
from support.skips import CountSkips

pytestmark = pytest.mark.slow

TYPES = model_types()
DENSE = {
    "zamba": "its layers share their weights, which are lent to none",
}
"""Types whose patched blocks run dense all the same."""


@dataclass
class Tried:
    """A stock model of one type, and what it gives; the tests share it, and each leaves it stock."""

    kind: ModelType

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.kind.build()

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return self.kind.inputs(self.model)

    @cached_property
    def stock(self) -> Tensor:
        return self.outputs(self.model)

    def outputs(self, model: PreTrainedModel) -> Tensor:
        return self.kind.outputs(model, self.inputs)


_found: dict[str, Coverage] = {}


def found(kind: ModelType, model: PreTrainedModel | None = None) -> Coverage:
    """The coverage of one type, found out once."""
    if kind.name not in _found:
        _found[kind.name] = coverage(kind, kind.build() if model is None else model)
    return _found[kind.name]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Tiny models have odd sizes, which transformers remarks on."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module", params=TYPES)
def tried(request: pytest.FixtureRequest) -> Tried:
    return Tried(TYPES[request.param])


@pytest.fixture
def patchable(tried: Tried) -> Tried:
    if found(tried.kind, tried.model).refusal:
        pytest.skip("refused; the page says why")
    return tried


def test_the_page_says_what_is_patched(tried: Tried) -> None:
    row = found(tried.kind, tried.model).row()
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), "python tests/coverage_page.py"


def test_the_inputs_reach_every_ffn(tried: Tried) -> None:
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in tried.model.named_modules()
    ]
    tried.outputs(tried.model)
    for handle in handles:
        handle.remove()
    for ffn in ffns(tried.model):  # of a list of experts, some
        assert any(weight.rpartition(".")[0] in called for weights in ffn.weights for weight in weights)


def test_the_unchanged_function_to_the_bit_or_refused(tried: Tried) -> None:
    model = tried.model
    assert tried.stock.isfinite().all()
    modules = dict(model.named_modules())
    if found(tried.kind, model).refusal:
        with pytest.raises(PatchError):
            hf_sparse.patch(model, "original")
    else:
        hf_sparse.patch(model, "original")
        assert torch.equal(tried.outputs(model), tried.stock)
        hf_sparse.unpatch(model)
    assert all(modules[name] is module for name, module in model.named_modules())
    assert torch.equal(tried.outputs(model), tried.stock)


def test_relu_is_the_stock_model_with_relu_and_is_saved(patchable: Tried, tmp_path: Path) -> None:
    model = patchable.model
    by_hand = patchable.kind.build()
    report = hf_sparse.patch(model, "relu")
    swapped = swap_activations(by_hand, report.blocks)
    with hf_sparse.backend("dense"):
        changed = patchable.outputs(model)
        if swapped:
            assert torch.equal(changed, patchable.outputs(by_hand))
        model.save_pretrained(tmp_path)
        loaded = in_own_memory(patchable.kind.auto.from_pretrained(tmp_path))
        assert len(hf_sparse.inspect(loaded).blocks) == len(report.blocks)
        assert torch.equal(patchable.outputs(loaded), changed)
    for patched in (model, loaded):
        hf_sparse.unpatch(patched)
        assert torch.equal(patchable.outputs(patched), patchable.stock)


@pytest.mark.parametrize("backend", [CPP])
def test_generation_that_skips_gives_the_dense_tokens(patchable: Tried, backend: str) -> None:
    model, kind = patchable.model, patchable.kind
    if kind.auto_class not in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        pytest.skip("no text model")
    prompt = patchable.inputs["input_ids"][:1]
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 1
    hf_sparse.patch(model, "relu")
    tokens = {}
    for name in ("dense", backend):
        with hf_sparse.backend(name), CountSkips() as skips:
            tokens[name] = model.generate(prompt, **options)
        assert (skips.count > 0) == (name == backend and kind.name not in DENSE)
    hf_sparse.unpatch(model)
    assert torch.equal(tokens["dense"], tokens[backend])


def swap_activations(model: PreTrainedModel, blocks: Sequence[Block]) -> bool:
    """nn.ReLU in the place of the activations of a stock ``model``, where ``blocks`` are.

    False where that cannot be done by hand: experts with an activation that is written into their forward.
    """
    for block in blocks:
        owner, roles = model.get_submodule(block.name), block.roles
        if roles.act in owner._modules:
            owner._modules[roles.act] = nn.ReLU()
        elif isinstance(roles, LayerRoles):
            children: dict[str, Any] = {**owner._modules, roles.act: nn.ReLU()}
            vars(owner)["forward"] = partial(_computed, roles, children)
        else:
            return False
    return True


def _computed(roles: LayerRoles, children: dict[str, Any], x: Tensor) -> Tensor:
    down: Tensor = children[roles.down](roles.hidden(children.__getitem__, x))
    return down


def in_own_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Loaded tensors lie in memory as in the file; where they begin can change the last bit of a product."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def test_the_whole_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page([found(kind) for kind in TYPES.values()])


def test_no_registered_type_is_forgotten() -> None:
    assert auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() <= TYPES.keys() | NOT_BUILT.keys()
    assert not TYPES.keys() & NOT_BUILT.keys()


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("llama", {"LlamaMLP": 2}),
        ("opt", {"OPTDecoderLayer": 2}),
        ("bart", {"BartEncoderLayer": 2, "BartDecoderLayer": 2}),
        ("bert", {"BertLayer": 2}),
        ("phi3", {"Phi3MLP": 2}),
        ("gpt2", {"GPT2MLP": 2}),
        ("mixtral", {"MixtralExperts": 2}),
        ("qwen2_moe", {"Qwen2MoeExperts": 2, "Qwen2MoeMLP": 2}),
        ("dbrx", {"DbrxExpertGLU": 2}),
        ("switch_transformers", {"SwitchTransformersDenseActDense": 4}),
        ("mamba", {}),
        ("jamba", {"JambaMLP": 1, "JambaExperts": 1}),
        ("llava", {"CLIPMLP": 2, "LlamaMLP": 2}),
    ],
)
def test_inventory_counts_what_is_there(name: str, counts: dict[str, int]) -> None:
    seen: dict[str, int] = {}
    for ffn in ffns(TYPES[name].build()):
        seen[ffn.class_name] = seen.get(ffn.class_name, 0) + 1
    assert seen == counts
