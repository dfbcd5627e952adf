"""The embedded model, which is a real one, and text of the kind that it knows."""

from __future__ import annotations

import argparse
import collections
import inspect
import logging
import os
import subprocess

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_sparse.assets import TINY_MODEL


def embedded_model() -> PreTrainedModel:
    """In float32 and training mode."""
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).train()


def documentation(windows: int, length: int) -> Tensor:
    """Windows ``[windows, length]`` of the documentation that the running Python carries."""
    modules = (argparse, collections, logging, os, subprocess)
    found = [inspect.getdoc(one) for module in modules for _, one in sorted(vars(module).items())]
    text = "\n\n".join(doc for doc in found if doc)
    ids = AutoTokenizer.from_pretrained(TINY_MODEL)(text, verbose=False)["input_ids"]
    return torch.tensor(ids[: windows * length]).view(windows, length)
