"""Low-rank adapters: train them, the norms and the biases, and merge them at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_sparse.checks import known, mapping
from hf_sparse.fields import check_types, require

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What the field ``lora`` of a recipe says (LoRA, arXiv 2106.09685, through PEFT)."""

    r: int = 16
    """Rank."""
    alpha: float = 16.0
    """The product of the factors is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of the adapters."""
    targets: str | None = None
    """Linear layers that get one, as a regular expression on their names; none means all but the output's."""
    norms: bool = True
    """Train the weights of the norms as well."""
    biases: bool = True
    """Train all biases as well, zeroth biases among them."""

    def __post_init__(self) -> None:
        check_types(self, "lora.")
        require(self.r >= 1, "lora.r", self.r, "it must be at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "it must be positive")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "it must be in [0, 1)")

    @classmethod
    def read(cls, value: Any) -> Lora:
        """From a mapping of fields.

        Raises:
            ValueError: names the field, its value and the mend.

        """
        given = mapping("lora", value)
        known("lora", list(given), list(cls.__dataclass_fields__))
        return cls(**given)


def add_lora(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """``model`` with adapters, frozen but for what ``lora`` trains.

    Raises:
        ValueError: no layer of the model is a target.

    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it, whatever its annotation says
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        parent = wrapped.get_submodule(name.rpartition(".")[0])
        if "lora_" in name:
            continue
        is_bias = "bias" in name.removeprefix("base_model.")
        parameter.requires_grad_(
            (lora.biases and is_bias) or (lora.norms and not is_bias and _is_norm(parent))
        )
    return wrapped


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() <= 1
