"""patch, unpatch, inspect, set_mix: the model's MLP blocks exchanged in place, all or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse import checkpoint_block
from hf_sparse.activations import ActivationConfig, row_of
from hf_sparse.activations.mixed import mixed
from hf_sparse.adapters import Block, Skipped, require_blocks
from hf_sparse.checkpoint_block import Record
from hf_sparse.compiled_step import compile_step, stock_step
from hf_sparse.composite import LANGUAGE, Part, find_part, listed, parts_of, pass_on_refusal
from hf_sparse.config import SparsityConfig
from hf_sparse.described import described_part
from hf_sparse.errors import PatchError
from hf_sparse.exchange import choose, exchange, new_activation, new_modules, outside, places
from hf_sparse.gguf import forget_gguf
from hf_sparse.greedy_decoding import decode_greedily, require_output_layer, stock_decoding
from hf_sparse.inputs import pruned, thresholded
from hf_sparse.modules import (
    KeptBlock,
    KeptChange,
    ParameterLeaf,
    SparseBlock,
    decode_linears,
    require_stock_linears,
    sparse_part,
    sparse_parts,
    stock_linears,
)
from hf_sparse.packed_attention import pack_while_generating
from hf_sparse.part_reports import blocks_of, inspected, patched_parts, report
from hf_sparse.patch_report import PatchReport
from hf_sparse.selection import Patterns, Selection
from hf_sparse.stock import stock_activation, stock_name
from triton_ops.activations import TABLE


def patch(
    model: nn.Module,
    config: SparsityConfig | Mapping[str, Any] | str = "relu",
    *,
    part: str = LANGUAGE,
    include: Patterns = None,
    exclude: Patterns = None,
    **fields: Any,
) -> PatchReport:
    """Replace the MLP blocks of ``model`` by sparse ones, in place.

    No weight is copied and no parameter or child is renamed. The change is written to ``model.config``, so
    ``save_pretrained``, ``push_to_hub`` and, after ``import hf_sparse``, ``from_pretrained`` keep it. A model
    that is patched already is patched anew, from its stock blocks; other parts of it stay as they are.

    Args:
        model: a transformers model, also one wrapped by PEFT. Its config object is changed, too; another
            model built from the very same object should be given a copy.
        config: a :class:`SparsityConfig`, what its ``to_dict`` gives, or the name of an activation.
        part: of a model made of several, such as vision and text, the one to patch, by the name of its config
            without ``_config``: ``"vision"`` for ``config.vision_config``. ``"text"`` is always the part that
            writes text, and all of a model that is not made of several. ``inspect`` lists them.
        include: a pattern, or several, on the qualified names of blocks, such as ``"*.layers.[0-3].*"``: only
            blocks that match one are patched. What is kept in the config are the numbers of the blocks.
        exclude: the same, of blocks to leave as they are.
        **fields: fields of :class:`SparsityConfig` when ``config`` is a name, such as ``threshold=0.01``.

    Returns:
        what was changed; it prints as a summary.

    Raises:
        PatchError: nothing to patch, or this model cannot take this config. The model is as it was.
        ValueError: a field of the config is out of its range.

    """
    config = SparsityConfig.read(config, **fields)
    selection = Selection.of(include, exclude)
    base = transformers_model(model)
    whole = find_part(base, part)
    plans = [_plan(base, whole, index, config, selection) for index in range(len(whole.models))]
    first = plans[0]
    if any(plan.record != first.record for plan in plans):
        raise PatchError(
            f"{' and '.join(name for name, _ in whole.models)} are built from one config, so they have to be "
            "patched alike, and their MLP blocks differ, or the selected ones do."
        )
    record = first.record
    parts = {place: own for plan in plans for place, own in places(plan.blocks, plan.new).items()}
    name = stock_name(base, record, parts, whole.path)

    if lost := [place for plan in plans for place in _trained_leaves(plan)]:
        warnings.warn(f"this patch drops what was trained as {', '.join(lost[:3])}.", stacklevel=2)

    # Everything that can fail has been done; from here on there are only assignments.
    record.write(whole.config, stock_name=name)
    pass_on_refusal(base.config)
    for plan in plans:
        exchange(base, plan.blocks, plan.new, plan.around)
    forget_gguf(base)
    chosen = [block for plan in plans for block in plan.chosen]
    patched = [replace(block, module=base.get_submodule(block.name)) for block in chosen]
    skipped = [one for plan in plans for one in plan.skipped]
    return report(base, whole, record.config, patched, skipped, record, name)


def unpatch(model: nn.Module, *, part: str | None = None) -> PatchReport:
    """Undo :func:`patch`: the very stock modules come back, with their weights as they are now.

    Args:
        model: a patched model.
        part: the part to put back, as :func:`patch` takes it; None means all that are patched.

    Raises:
        PatchError: the model, or the part, is not patched.

    """
    base = transformers_model(model)
    require_stock_linears(base)
    reports = []
    for one, record in patched_parts(base, part):
        blocks, skipped = blocks_of(one)
        new, around = new_modules(blocks, [], record.config), outside(base, blocks, [], record.config)
        exchange(base, blocks, new, around)
        record.erase(one.config)
        blocks = [replace(b, module=base.get_submodule(b.name)) for b in blocks]
        reports.append(report(base, one, None, blocks, skipped, record))
    pass_on_refusal(base.config)
    if not sparse_parts(base):
        stock_decoding(base)
        stock_linears(base)
        stock_step(base)
    return replace(reports[0], others=reports[1:])


def inspect(
    model: nn.Module, *, part: str | None = None, include: Patterns = None, exclude: Patterns = None
) -> PatchReport:
    """What :func:`patch` would change, or, on a patched model, what is patched. Changes nothing.

    Args:
        model: a transformers model, also one wrapped by PEFT.
        part: the part to look at, as :func:`patch` takes it. None means the language part, with the others in
            ``others``; if only others are patched, the first of these.
        include: as of :func:`patch`; blocks of that part that are not selected are left out.
        exclude: likewise.

    Raises:
        PatchError: the modules of a patched model were changed to something that no config can say.

    """
    selection = Selection.of(include, exclude)
    base = transformers_model(model)
    main = find_part(base, LANGUAGE if part is None else part)
    reports = [inspected(base, main)]
    if part is None:
        others = [inspected(base, one) for one in parts_of(base) if one.path != main.path]
        reports += [one for one in others if one.blocks or one.config is not None]
        reports.sort(key=lambda one: one.config is None)  # stable: of its kind, the main one stays first
    first = reports[0]
    if selection is not None:
        first = replace(first, blocks=[first.blocks[i] for i in selection.indices(first.blocks)])
    return replace(first, others=reports[1:])


def set_mix(model: nn.Module, k: float, *, part: str | None = None) -> None:
    """Set the share ``k`` of the new activation on every patched block (see ``SparsityConfig.mix``).

    A saved model keeps it. Meant to be called at every step of a finetune. ``part`` as of :func:`unpatch`.

    Raises:
        PatchError: the model, or the part, is not patched.
        ValueError: ``k`` is outside [0, 1].

    """
    base = transformers_model(model)
    found = patched_parts(base, part, "set_mix needs a patched model; ")
    configs = [old.config.changed(activation=old.config.activation.with_mix(k)) for _, old in found]
    changes = [
        (one, replace(old, config=new))
        for (one, old), new in zip(found, configs, strict=True)
        if new != old.config
    ]
    for one, record in changes:
        blocks = one.all_blocks
        for copy in (copy for block in blocks for copy in (block, *block.spares)):
            if (sparse := sparse_part(copy.module)) is not None:
                sparse.set_mix(record.config.activation.mix)
        _write(base, one, record)
    if changes:
        pass_on_refusal(base.config)


def set_activation(model: nn.Module, activation: ActivationConfig, *, part: str | None = None) -> None:
    """Give every patched block another activation. Weights and all else that a patch put there stay.

    Where :func:`patch` would make the blocks anew. ``part`` as of :func:`unpatch`.

    Raises:
        PatchError: the model, or the part, is not patched, or its blocks cannot take the activation.

    """
    base = transformers_model(model)
    changes: list[tuple[Part, Record, list[tuple[SparseBlock | KeptBlock, nn.Module]]]] = []
    for one, old in patched_parts(base, part, "set_activation needs a patched model; "):
        if activation.relu_up != old.config.activation.relu_up:
            raise PatchError(
                f"{activation} and {old.config.activation} differ in what they make of the up projection, "
                "which is more than the activation of a block; use patch."
            )
        config = old.config.changed(activation=activation)
        new: list[tuple[SparseBlock | KeptBlock, nn.Module]] = []
        count = 0
        for index in range(len(one.models)):
            patched = [block for block in one.blocks(index)[0] if block.is_patched]
            count = len(one.blocks(index)[0])
            if activation.blocks not in (None, len(patched)):
                raise PatchError(f"{activation} has values for {activation.blocks} of {len(patched)} blocks.")
            for number, block in enumerate(patched):
                activation.check(block)
                for copy in (block, *block.spares):
                    if (sparse := sparse_part(copy.module)) is not None:
                        own = new_activation(copy, config, number)
                        new.append((sparse, mixed(copy.original_activation, own, activation.mix)))
        record = Record.of(config, count, old.field, old.activation)
        changes.append((one, record, new))
    for one, record, new in changes:
        for sparse, own in new:
            sparse.set_activation(own)
        _write(base, one, record)
    pass_on_refusal(base.config)


def update_config(model: nn.Module) -> None:
    """Let the config of a patched model say what its modules compute now, as saving it does.

    Raises:
        PatchError: no config can say it.

    """
    base = transformers_model(model)
    for part in parts_of(base):
        now, said = described_part(part), checkpoint_block.read(part.config)
        if now is not None and now != said:
            _write(base, part, now)
    pass_on_refusal(base.config)


def _write(base: PreTrainedModel, part: Part, record: Record) -> None:
    """Let the config say what the blocks now are."""
    parts = {name: own for block in part.all_blocks for name, own in block.parts.items()}
    record.write(part.config, stock_name=stock_name(base, record, parts, part.path))


def prepare(
    model: nn.Module,
    *,
    certify: bool = False,
    linears: bool = True,
    greedy_output: bool = False,
    compile: bool = False,
) -> None:
    """Get a patched model ready for inference.

    Down projections, and linear layers with thresholds on their inputs, are stored neuron-major: same values
    and shape, other strides. That lasts until somebody gets to the weights of the model (to train, save,
    move, list or change them), and is done again by the next call that skips. Without this call the first
    that skips does it, block by block. A compiled graph can do neither: call this last before
    ``torch.compile``, else the graph runs dense on the stock layout, and without certificates.

    Args:
        model: a patched model.
        certify: decode single sequences without reading most of the projection that decides which neurons are
            active. A certificate of it, one byte per weight (of the gate, or of the up projection of a plain
            MLP) and 12 per neuron, proves most silent neurons silent. The result is the same, bit for bit. It
            pays where few neurons are active; several tokens in a call, MLPs whose module stays (in the
            report, layers and not MLPs: OPT, BERT), and those with top-k, are computed without it. It is used
            while nobody but the model holds that projection, so that no change of it goes unnoticed: with an
            optimizer or a list of its parameters at hand, decoding goes on without. False ends its use.
            CATS has none: that a pre-activation is small does not prove its neuron silent. With ``compile``
            each ``model.generate`` makes them anew for its compiled steps, whoever holds the weights, and a
            change through ``.data`` while it runs is not noticed.
        linears: multiply a few tokens with all other weights, too (of attention, of the output, of MLPs that
            do not skip), at the speed of memory: :func:`triton_ops.linear`, where on this machine it is no
            slower than torch's, and those that torchao has rounded to int8. Only on the CPU, and without
            gradient; the result is summed in another order. Their layers, as objects and with all that is in
            them, become of a subclass of ``nn.Linear`` until :func:`unpatch`. In bfloat16 and float16 the
            attention of a new token is :func:`triton_ops.decode_attention`, in ``model.generate``.
            False undoes it.
        greedy_output: have ``model.generate`` read half of the output layer where it decodes greedily:
            without sampling, beams, an assistant, logits processors or scores to return, and for 32 new
            tokens or more. An int8 copy of that layer, made anew by each ``generate``, proves which logits
            are not the largest of their token, and these are not computed. The tokens are the very same. It
            costs a byte for each weight of the layer, and is for models whose logits are its products as
            they are; others compute all, and so does whatever is not such a ``generate``. Only on the CPU,
            with ``linears``. Not noticed is a change of that weight through ``.data`` while ``generate``
            runs. False ends it.
        compile: let ``model.generate`` compile its decode step, as one graph, when it first takes one (which
            takes a minute or more, and again where sizes change), with a static cache. It pays for small
            models, whose steps are mostly Python. transformers does all of it, by fields of
            ``model.generation_config`` that ``save_pretrained`` leaves out. What cannot have a static cache
            or be compiled fails meanwhile: assisted generation, prompt tuning, offloaded layers. Together
            with ``certify`` on the CPU only. False ends it.

    Raises:
        PatchError: the model is not patched; or, for a certificate, it has an activation that is never
            exactly zero, or CATS, or is to be compiled on another device than a CPU; or transformers cannot
            compile it. Nothing is changed.

    Warns:
        UserWarning: blocks cannot skip while something else holds their weights.

    """
    base = transformers_model(model)
    sparse = sparse_parts(base)
    if not sparse:
        raise PatchError(f"prepare needs a patched model; this {type(base).__name__} is not patched.")
    if certify and all(row_of(part.activation) is None for part in sparse):
        raise PatchError(
            f"certify=True needs activations that can be exactly zero; the blocks of this "
            f"{type(base).__name__} have {type(sparse[0].activation).__name__}. Patch with another one "
            'first, such as "relu".'
        )
    if greedy_output and not linears:
        raise PatchError(
            "greedy_output=True and linears=False exclude each other: the products of the output layer are "
            "those of linears=True. Leave one out."
        )
    if greedy_output:
        require_output_layer(base)
    rows = {row[0] for part in sparse if (row := row_of(part.activation)) is not None}
    if certify and not any(TABLE[name].certifiable for name in rows):
        raise PatchError(
            f"certify=True proves neurons silent by an upper bound of their pre-activations, but with "
            f"{', '.join(sorted(rows))} a neuron may be active below where it is silent. Leave certify out."
        )
    if not linears:
        require_stock_linears(base)
    if compile:
        compile_step(base, certify=certify)
    else:
        stock_step(base)
    stock_decoding(base)
    for part in sparse:  # a compiled step has certificates of its own
        part.prepare(certify=certify and not compile)
    (decode_linears if linears else stock_linears)(base)
    if linears and not compile:
        pack_while_generating(base)
    if greedy_output:
        decode_greedily(base)
    for owner, name in thresholded(base):
        pruned(owner, name).prepare()
    if held := sum(pruned(owner, name).is_held for owner, name in thresholded(base)):
        warnings.warn(
            f"{held} linear layers with thresholds on their inputs run dense for now: something holds their "
            "weights (an optimizer, a list of parameters, a kept state dict).",
            stacklevel=2,
        )
    if held := sum(part.is_held for part in sparse):
        warnings.warn(
            f"{held} of {len(sparse)} MLP blocks run dense for now: something holds their down projections "
            "(an optimizer, a list of parameters, a kept state dict), or these lie in memory that torch did "
            "not allocate (an array, an unpickled model; copy.deepcopy(model) has its own).",
            stacklevel=2,
        )


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that ``model`` is, or that PEFT wrapped.

    Raises:
        PatchError: there is none.

    """
    unwrap = getattr(model, "get_base_model", None)  # PEFT
    base = unwrap() if callable(unwrap) else model
    if not isinstance(base, PreTrainedModel):
        raise PatchError(
            f"expected a transformers model (PreTrainedModel, or one wrapped by PEFT), not {type(model)}; "
            "pass the model itself, before it is wrapped by DDP, FSDP or torch.compile."
        )
    return base


@dataclass(frozen=True)
class _Plan:
    """What a patch is about to do in one model."""

    blocks: Sequence[Block]
    chosen: Sequence[Block]
    skipped: Sequence[Skipped]
    record: Record
    new: Mapping[str, nn.Module | KeptChange]
    """By name, what comes in the place of ``blocks`` and their spares."""
    around: Sequence[Callable[[], None]]
    """What is done outside of them."""


def _plan(
    base: PreTrainedModel, part: Part, index: int, config: SparsityConfig, selection: Selection | None
) -> _Plan:
    prefix, model = part.models[index]
    blocks, skipped = part.blocks(index)
    if not blocks:
        require_blocks(base)
        raise PatchError(
            f"no MLP block of a known shape in the part {part.name!r} of {type(base).__name__}. "
            f"{listed(parts_of(base))} Choose one: patch(model, ..., part=...)."
        )
    if selection is not None:
        config = selection.resolve(config, blocks)
    chosen = choose(model, blocks, config)
    config = config.fitted(base, chosen)
    for part_of_config in config.parts.values():
        part_of_config.rehearse(base, chosen)
    own = (
        [block.place.removeprefix(f"{prefix}.") for block in blocks] if prefix else [b.place for b in blocks]
    )
    acts = {f"{name}.{block.roles.act}": block.activation for name, block in zip(own, blocks, strict=True)}
    record = Record.of(config, len(blocks), *stock_activation(base, part, model, acts))
    new, around = new_modules(blocks, chosen, config), outside(base, blocks, chosen, config)
    return _Plan(blocks, chosen, skipped, record, new, around)


def _trained_leaves(plan: _Plan) -> list[str]:
    """The names of parameters of ours that are not zero, and that ``plan`` leaves out."""
    kept = {id(leaf) for new in plan.new.values() if isinstance(new, nn.Module) for leaf in new.children()}
    return [
        f"{block.name}.{name}"
        for block in plan.blocks
        for name, leaf in block.module.named_children()
        if isinstance(leaf, ParameterLeaf) and id(leaf) not in kept
        if any(not p.is_meta and bool(p.detach().count_nonzero()) for p in leaf.parameters())
    ]
