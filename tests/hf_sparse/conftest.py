"""Tiny models of stock transformers classes, one per MLP layout that is patched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from support.models import tiny

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "stablelm", "phi3", "glm")
PLAIN = ("gpt_neox", "phi", "nemotron", "starcoder2", "gpt2", "persimmon")


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return tiny


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 17))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take ``model_type``, ``gated_type`` or ``plain_type`` run for each of them."""
    for name, values in (("model_type", GATED + PLAIN), ("gated_type", GATED), ("plain_type", PLAIN)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)
