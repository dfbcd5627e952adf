"""Accelerate's device hooks, which live on a module object and must follow when another takes its place."""

from __future__ import annotations

from torch import nn


def carry_device_hook(source: nn.Module, target: nn.Module) -> None:
    """Make the ``_hf_hook`` (device placement, offload) of ``target`` that of ``source``: set, or absent."""
    hook, current = vars(source).get("_hf_hook"), vars(target).get("_hf_hook")
    if hook is current:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    if hook is None:
        remove_hook_from_module(target)
    else:
        add_hook_to_module(target, hook)
