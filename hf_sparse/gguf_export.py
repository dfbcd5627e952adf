"""A model as a GGUF file for llama.cpp, in an architecture of it that runs this very activation.

Each architecture of llama.cpp has its activation written into it; no field of a file says another. With the
layers of a Llama, ``llama`` runs SiLU, ``arcee`` and ``nemotron`` squared ReLU in a plain MLP, and
``smallthinker`` ReLU in gated experts. One expert and a router of zeros are an MLP: its weight is the softmax
of a single number, exactly 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_sparse.activations.config import same_function
from hf_sparse.errors import PatchError
from hf_sparse.gguf_vocabulary import add_vocabulary
from hf_sparse.patch_report import PatchReport, in_words
from hf_sparse.stock import activation_name

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "ffn_norm", "output_norm")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp runs under a name."""

    name: str
    activation: str
    """By transformers' name."""
    biases: tuple[str, ...] = ()
    """What may have one."""
    scaled: bool = False
    """Whether it takes factors of the rotary frequencies."""
    pairs: bool = False
    """Whether rotary pairs lie side by side; half a head apart otherwise, as in transformers."""
    one_expert: bool = False
    ties: bool = True
    """Whether it may take the embedding for the head."""
    norm_plus_one: bool = False
    """Whether transformers adds 1 to the weights of norms, and llama.cpp does not."""


_LLAMA = Architecture("llama", "silu", (*_ATTENTION, *_MLP), scaled=True, pairs=True)
_SMALLTHINKER = Architecture("smallthinker", "relu", one_expert=True)
_ARCEE = Architecture("arcee", "relu2", scaled=True, pairs=True)
_NEMOTRON = Architecture("nemotron", "relu2", (*_ATTENTION, *_MLP, *_NORMS), ties=False, norm_plus_one=True)

FAMILIES = {
    "LlamaForCausalLM": (_LLAMA, _SMALLTHINKER),
    "MistralForCausalLM": (_LLAMA, _SMALLTHINKER),
    "ArceeForCausalLM": (_ARCEE,),
    "NemotronForCausalLM": (_NEMOTRON,),
}
"""Classes of transformers, and the architectures that have their layers."""


def write_gguf(model: Any, report: PatchReport, path: Path, tokenizer: Any = None) -> None:
    """Write ``model``, of which ``report`` speaks. Matrices keep their dtype, vectors are float32.

    Raises:
        PatchError: llama.cpp has no architecture that computes the same.
        ValueError: nor a tokenizer that does.
        ImportError: the ``gguf`` package is not installed.

    """
    kind = architecture(model, report)
    writer = _gguf().GGUFWriter(path, kind.name)
    try:
        _add_sizes(writer, model, kind)
        if tokenizer is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            add_vocabulary(writer, tokenizer, model.get_input_embeddings().num_embeddings)
        for name, array, raw in _arrays(model, kind):
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array, _ in _arrays(model, kind):  # once more, so that they are never all in memory
            writer.write_tensor_data(array)
    finally:
        writer.close()


def architecture(model: Any, report: PatchReport) -> Architecture:
    """The architecture of llama.cpp that computes what ``model`` does.

    Raises:
        PatchError: there is none, or none that is known; says what llama.cpp would compute.

    """
    cls, config = type(model), model.config
    if cls.__name__ not in FAMILIES or not cls.__module__.startswith("transformers."):
        raise PatchError(
            f"GGUF files are written of {', '.join(FAMILIES)}, not of {cls.__name__}. llama.cpp's own "
            "converter knows more classes, of which llama.cpp computes the original activation, whatever the "
            "model has."
        )
    kinds = FAMILIES[cls.__name__]
    name = report.stock_name if report.config else activation_name([b.activation for b in report.blocks])
    kind = next((k for k in kinds if name and same_function(ACT2FN[name], ACT2FN[k.activation])), None)
    if kind is None:
        said = name if report.config is None else in_words(report.config)
        some = "" if report.config is None or report.config.layers is None else " in some of its layers"
        runs = ", ".join(f"{k.name!r} computes {k.activation}" for k in kinds)
        raise PatchError(
            f"llama.cpp has no architecture for {cls.__name__} with {said}{some}: {runs}, whatever a file "
            "says."
        )
    lacks = f"llama.cpp's architecture {kind.name!r}, the one with {kind.activation}, has no"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise PatchError(f"{lacks} sliding window; this model has one of {window} tokens.")
    scaling = config.rope_parameters["rope_type"]
    if scaling not in ("default", "linear", "llama3"):
        raise PatchError(f"rope_type={scaling!r} cannot be written; default, linear and llama3 can.")
    if _factors(model) is not None and not kind.scaled:
        raise PatchError(f"{lacks} scaled rotary frequencies; this model has rope_type={scaling!r}.")
    for name, tensor in _named(model, kind):
        module, _, tail = name.rpartition(".")
        if tail == "bias" and module.rpartition(".")[2] not in kind.biases:
            raise PatchError(f"{lacks} bias in {module}; this model has one.")
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.dtype not in _file_types():
            raise PatchError(
                f"{module} is quantised, split, or not in memory; load the model as plain tensors."
            )
    return kind


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("writing a GGUF file needs: pip install 'hf-sparse[gguf]'") from error
    return gguf


def _file_types() -> dict[torch.dtype, int]:
    kinds = _gguf().LlamaFileType
    return {
        torch.float32: kinds.ALL_F32,
        torch.float16: kinds.MOSTLY_F16,
        torch.bfloat16: kinds.MOSTLY_BF16,
    }


def _add_sizes(writer: Any, model: Any, kind: Architecture) -> None:
    config, embedding = model.config, model.get_input_embeddings()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(_file_types()[embedding.weight.dtype])
    writer.add_vocab_size(embedding.num_embeddings)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(model.base_model.layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(2 * len(_rotary(model).inv_freq))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if kind.one_expert:
        writer.add_expert_count(1)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_gating_func(_gguf().ExpertGatingFuncType.SOFTMAX)


def _named(model: Any, kind: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``model``, by the names of llama.cpp."""
    gguf = _gguf()
    # The MLP of a Llama has other names than the expert that it is to be.
    wanted = "llama" if kind.one_expert else kind.name
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    names = gguf.get_tensor_name_map(number, len(model.base_model.layers))
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied and kind.ties:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PatchError(f"llama.cpp's architecture {kind.name!r} has nothing like {name}.")
        yield found, tensor


def _arrays(model: Any, kind: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Name and array of each tensor of the file, and its type where numpy has none."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, tensor in _named(model, kind):
        module = name.split(".")[-2]
        if kind.pairs and module in heads:
            halves = tensor.unflatten(0, (heads[module], 2, -1))
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if kind.norm_plus_one and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        if kind.one_expert and module in _MLP:
            name, tensor = name.replace(module, f"{module}_exps"), tensor[None]
        tensor = (tensor.float() if tensor.dim() == 1 else tensor).detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            yield name, tensor.view(torch.uint8).numpy(), _gguf().GGMLQuantizationType.BF16
        else:
            yield name, tensor.numpy(), None
        if kind.one_expert and module == "ffn_norm":
            router = torch.zeros(1, model.config.hidden_size)
            yield name.replace(module, "ffn_gate_inp"), router.numpy(), None
    if (factors := _factors(model)) is not None:
        yield "rope_freqs.weight", factors.numpy(), None


def _rotary(model: Any) -> Any:
    """A rotary embedding as that of ``model``, in float32."""
    with torch.device("cpu"):
        return type(model.base_model.rotary_emb)(config=model.config)


def _factors(model: Any) -> Tensor | None:
    """By what each rotary frequency is divided; None for 1."""
    rotary = _rotary(model)
    factors: Tensor = rotary.compute_default_rope_parameters(model.config)[0] / rotary.inv_freq
    return None if bool((factors == 1).all()) else factors
