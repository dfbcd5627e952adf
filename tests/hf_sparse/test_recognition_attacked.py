"""Forwards that compute a known formula on most inputs, or today, or with a side effect: not taken for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hf_sparse
from hf_sparse.adapters.shapes import recognise
from support.every_type import model_types
from support.models import tiny
from support.peek import layouts, sparse_blocks


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 20), nn.Linear(20, 8), nn.GELU()
        self.scale, self.history = 1.0, []
        self.more()

    def more(self) -> None:
        pass

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class WithBuffer(Plain):
    def more(self) -> None:
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x):
        h = self.act(self.up(x))
        self.peak.copy_(torch.maximum(self.peak, h.abs().max()))
        return self.down(h)


class WithParameter(Plain):
    def more(self) -> None:
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.down(self.act(self.up(x))) * self.gain


class Observer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def forward(self, x):
        self.seen = max(self.seen, x.abs().max().item())
        return x


class WithObserver(Plain):
    def more(self) -> None:
        self.observer = Observer()

    def forward(self, x):
        return self.down(self.observer(self.act(self.up(x))))


class WithSetting(Plain):
    def forward(self, x):
        return self.down(self.act(self.up(x)) * self.scale)


class WithRecord(Plain):
    def forward(self, x):
        h = self.act(self.up(x))
        self.history.append(h)
        return self.down(h)


class OtherForSequences(Plain):
    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        return y if x.shape[0] == 1 else 2 * y


class OtherForOneToken(Plain):
    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        return 2 * y if x.shape[1] == 1 else y


class OtherInFloat32(Plain):
    def forward(self, x):
        h = self.act(self.up(x))
        return self.down(h.clamp(max=0.5) if h.dtype == torch.float32 else h)


class OtherForTensors(Plain):
    def forward(self, x):
        h = self.act(self.up(x))
        return self.down(h.clamp(max=0.5) if isinstance(x, torch.Tensor) else h)


class OtherForWhatHasALength(Plain):
    def forward(self, x):
        h = self.act(self.up(x))
        try:
            return self.down(h[: len(x)].clamp(max=0.5))
        except TypeError:
            return self.down(h)


class OtherForLayersWithWeights(Plain):
    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        return y if getattr(self.up, "weight", None) is None else 2 * y


class SquaresItsInput(Plain):
    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        x *= x
        return y


class ZeroesItsInput(Plain):
    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        x.mul_(0)
        return y


@pytest.mark.parametrize(
    "mlp",
    [
        WithBuffer,
        WithParameter,
        WithObserver,
        WithSetting,
        WithRecord,
        OtherForSequences,
        OtherForOneToken,
        OtherInFloat32,
        OtherForTensors,
        OtherForWhatHasALength,
        OtherForLayersWithWeights,
        SquaresItsInput,
        ZeroesItsInput,
    ],
)
def test_it_is_not_the_plain_formula_and_is_not_touched(mlp) -> None:
    module = mlp()
    state = copy.deepcopy(module.state_dict())
    assert recognise(module) is None
    assert not module.history
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    if isinstance(module, WithObserver):
        assert module.observer.seen == 0


@pytest.mark.parametrize(
    "act",
    [
        lambda p: p * torch.sigmoid(p),
        lambda p: 0.5 * p * (1 + torch.erf(p / 2**0.5)),
    ],
)
def test_other_words_for_an_activation_have_other_bits(act) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

        def forward(self, x):
            return self.down(act(self.up(x)))

    assert recognise(Written()) is None


def skipping(model, ids):
    with torch.no_grad(), hf_sparse.backend("torch"):
        return model(ids).logits


def test_a_dropout_that_is_on_or_watched_or_replaced_is_called(input_ids) -> None:
    """Monte Carlo dropout, hooks and other modules in places that have no role."""
    model = tiny("gpt2", activation_function="relu", resid_pdrop=0.5)
    hf_sparse.patch(model, "original")
    expected = skipping(model, input_ids)
    calls: list[str] = []
    block = model.transformer.h[0].mlp
    handle = block.dropout.register_forward_hook(lambda *_: calls.append("dropout"))
    torch.testing.assert_close(skipping(model, input_ids), expected)
    assert calls
    handle.remove()
    for layer in model.transformer.h:
        layer.mlp.dropout.train()
    results = []
    for backend in ("dense", "torch"):
        torch.manual_seed(0)
        with torch.no_grad(), hf_sparse.backend(backend):
            results.append(model(input_ids).logits)
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], expected, atol=1e-2)
    for layer in model.transformer.h:
        layer.mlp.dropout = nn.Tanh()
    with torch.no_grad(), hf_sparse.backend("dense"):
        dense = model(input_ids).logits
    torch.testing.assert_close(skipping(model, input_ids), dense)


def test_a_block_takes_its_input_by_the_name_that_stock_has(tiny_model) -> None:
    model = tiny_model("gpt2")
    stock = copy.deepcopy(model.transformer.h[0].mlp)
    hf_sparse.patch(model, "original")
    x = torch.randn(2, 3, 32)
    assert torch.equal(model.transformer.h[0].mlp(hidden_states=x), stock(x))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "t5", "gpt2", "llama", "bert"])
def test_a_model_built_from_a_patched_config_has_the_weights_of_a_stock_one(name) -> None:
    """transformers gives first values by the class of a module."""
    kind = model_types()[name]
    torch.manual_seed(0)
    stock = kind.auto.from_config(kind.config())
    model = kind.auto.from_config(kind.config())
    hf_sparse.patch(model, "relu")
    torch.manual_seed(0)
    built = kind.auto.from_config(copy.deepcopy(model.config))
    assert hf_sparse.inspect(built).config is not None
    state = built.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stock.state_dict().items())


def test_experts_run_by_what_a_user_has_registered_do_not_skip() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def twice(self, x, experts, weights):
        return 2 * ALL_EXPERTS_FUNCTIONS["batched_mm"](self, x, experts, weights)

    ALL_EXPERTS_FUNCTIONS.register("twice", twice)
    ids = torch.arange(3, 20)[None]
    model = tiny("mixtral", num_local_experts=4)
    hf_sparse.patch(model, "relu")
    model.set_experts_implementation("twice")
    with torch.no_grad(), hf_sparse.backend("dense"):
        expected = model(ids).logits
    assert torch.equal(skipping(model, ids), expected)


def test_a_parametrised_down_projection_is_not_taken_out() -> None:
    model = tiny("opt")
    hf_sparse.patch(model, "relu")
    down = model.model.decoder.layers[1].fc2
    nn.utils.parametrize.register_parametrization(down, "weight", nn.Identity())
    with pytest.raises(hf_sparse.PatchError, match="linear layer 88 -> 32 are parametrised"):
        hf_sparse.unpatch(model)
    nn.utils.parametrize.remove_parametrizations(down, "weight")
    hf_sparse.unpatch(model)
    assert type(model.model.decoder.layers[1].fc2) is nn.Linear


def test_a_gradient_finds_the_stock_layout_also_where_a_dropout_is_watched() -> None:
    kind = model_types()["t5"]
    model = kind.build()
    hf_sparse.patch(model, "relu")
    inputs = kind.inputs(model)
    with torch.no_grad(), hf_sparse.backend("torch"):
        model(**inputs)
    assert layouts(model) == {True}
    for block in sparse_blocks(model):
        vars(block)["_modules"]["dropout"].register_forward_hook(lambda *_: None)
    model(**inputs)
    assert layouts(model) == {False}
