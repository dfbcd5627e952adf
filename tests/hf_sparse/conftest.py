"""Tiny models of stock transformers classes, one per MLP layout that is patched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from support.models import tiny

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "stablelm", "phi3", "glm")
ROUTED = ("mixtral",)
PLAIN = ("gpt_neox", "phi", "nemotron", "starcoder2", "gpt2", "persimmon")


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return tiny


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 17))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take one of these names run for each of its types."""
    types = {
        "model_type": GATED + PLAIN + ROUTED,
        "layered_type": GATED + PLAIN,
        "gated_type": GATED,
        "plain_type": PLAIN,
    }
    for name, values in types.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)
