"""Loss, perplexity and activation sparsity on held-out sequences, over all processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_sparse.adapters import find_blocks


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    loss: float
    """Mean cross-entropy of the next token, in nats."""
    layers: dict[str, float]
    """Share of exact zeros among the inputs of each down projection, over tokens and neurons, by block."""
    neurons: dict[str, int]
    """Neurons of each block."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over tokens, neurons and blocks."""
        return sum(self.layers[k] * self.neurons[k] for k in self.layers) / sum(self.neurons.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "sparsity": self.sparsity,
            "layers": self.layers,
            "tokens": self.tokens,
        }


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, sequences: Tensor, *, batch_size: int) -> Evaluation:
    """Evaluate on ``sequences`` (int64 [N, S], the same in every process).

    Each process takes every W-th sequence. All run equally many batches, as sharded models need; where a
    process has fewer sequences it repeats one without counting it.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    own = sequences[rank::world]
    rounds = math.ceil(math.ceil(len(sequences) / world) / batch_size)
    length = sequences.shape[1]
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    with _ZeroCounter(accelerator.unwrap_model(model)) as counter:
        for i in range(rounds):
            batch = own[i * batch_size : (i + 1) * batch_size]
            counter.rows = len(batch) * length
            if len(batch) == 0:
                model(input_ids=sequences[:1].to(accelerator.device), use_cache=False)
                continue
            ids = batch.to(accelerator.device)
            loss += model(input_ids=ids, labels=ids, use_cache=False).loss.double() * len(batch)
        zeros = accelerator.reduce(counter.zeros, "sum").tolist()
        loss = accelerator.reduce(loss, "sum")
    model.train(was_training)
    tokens = sequences.numel()
    layers = {
        name: zero / (tokens * width)
        for name, zero, width in zip(counter.names, zeros, counter.widths, strict=True)
    }
    widths = dict(zip(counter.names, counter.widths, strict=True))
    return Evaluation(loss.item() / len(sequences), layers, widths, tokens)


class _ZeroCounter:
    """Counts exact zeros at the input of every down projection, by hooks."""

    def __init__(self, model: nn.Module) -> None:
        blocks, _ = find_blocks(model)
        device = next(model.parameters()).device
        self.names = [block.name for block in blocks]
        self.zeros = torch.zeros(len(blocks), dtype=torch.int64, device=device)
        self.widths = [0] * len(blocks)
        self.rows = 0
        """Tokens of the current batch that count; they come first."""
        self._handles = [
            block.down_linear.register_forward_pre_hook(self._hook(i)) for i, block in enumerate(blocks)
        ]

    def _hook(self, index: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            h_TF = args[0].flatten(0, -2)[: self.rows]
            self.zeros[index] += h_TF.numel() - torch.count_nonzero(h_TF)
            self.widths[index] = h_TF.shape[1]

        return count

    def __enter__(self) -> _ZeroCounter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
