"""Random token ids of which some are padding."""

from __future__ import annotations

import torch


def batches(count: int = 3, vocabulary: int = 128) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of two rows of 24, the first with five tokens of padding; the same every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (count, 2, 24), generator=generator)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :5] = 0
    return [{"input_ids": one, "attention_mask": mask} for one in ids]
