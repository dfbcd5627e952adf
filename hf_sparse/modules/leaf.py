"""The base of modules that hold parameters which stock blocks do not have."""

from __future__ import annotations

from torch import nn


class ParameterLeaf(nn.Module):
    """A module without children that holds parameters of ours, as a child of a sparse block.

    Parameters sit in leaves and not on the block itself, so that offloading, ZeRO-3 and PEFT's
    ``modules_to_save`` treat them as any other. The child has the name of its part of the config
    (``hf_sparse.config.PARTS``), and its parameters have the device and dtype of the block's.
    """

    def reset_parameters(self) -> None:
        """Give the parameters their first values.

        Called for every load of a model, for parameters that are in the checkpoint as well: use the functions
        of ``transformers.initialization``, which leave loaded ones as they are.
        """
        raise NotImplementedError
