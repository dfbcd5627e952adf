"""What other tools put on one module object, and must follow when another takes its place.

Accelerate's device hooks, and the wrappers that transformers puts around the forward of a module whose
parameters it splits between processes (``tp_plan``).
"""

from __future__ import annotations

from torch import nn

from hf_sparse.adapters.split import splitting


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Make the ``_hf_hook`` (device placement, offload) of ``target`` that of ``source``: set, or absent.

    And let it be split between processes in the same way, if ``source`` is split.
    """
    hook, current = vars(source).get("_hf_hook"), vars(target).get("_hf_hook")
    if hook is not current:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        if hook is None:
            remove_hook_from_module(target)
        else:
            add_hook_to_module(target, hook)
    if "forward" not in vars(target) and (found := splitting(source)) is not None:
        style, mesh = found
        style.install_forward(target, mesh)
