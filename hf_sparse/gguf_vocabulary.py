"""The vocabulary of a GGUF file, from a fast tokenizer that llama.cpp is known to cut texts like."""

from __future__ import annotations

import json
import warnings
from typing import Any, NoReturn

_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([{**_BYTES, "use_regex": True}], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}], False),
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False},
            {**_BYTES, "use_regex": False},
        ],
        True,
    ),
}
"""How byte-level tokenizers cut a text before they merge, by llama.cpp's names; and whether a word that is a
token stays whole, whatever the merges say."""

_SPACE = "▁"
_PREFIXED = [{"type": "Prepend", "prepend": _SPACE}]
_SPACES = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
_SCHEMES = ("first", "always", "never")


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Give ``writer``, a ``gguf.GGUFWriter``, the vocabulary of ``tokenizer``, with ``size`` tokens.

    Raises:
        ValueError: llama.cpp would give other tokens for some texts, or that is not known.

    """
    from gguf import TokenType

    if not getattr(tokenizer, "is_fast", False):
        _refuse(f"{type(tokenizer).__name__}, which is not a fast tokenizer")
    if (last := max(tokenizer.get_vocab().values())) >= size:
        _refuse(f"{last + 1} tokens, where the model has {size}")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = rules["model"], {one["id"]: one for one in rules["added_tokens"]}
    if model["type"] != "BPE" or model["dropout"]:
        _refuse(f"a model of the type {model['type']}")
    if any(one["lstrip"] or one["rstrip"] or one["single_word"] for one in added.values()):
        _refuse("tokens that take blanks or whole words")
    ids = {text: number for text, number in model["vocab"].items() if number not in added}
    merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
    (_pieces if model["byte_fallback"] else _byte_level)(writer, rules, ids, merges, size)

    texts, kinds = [f"[PAD{number}]" for number in range(size)], [TokenType.UNUSED] * size
    for text, number in ids.items():
        is_byte = model["byte_fallback"] and len(text) == 6 and text.startswith("<0x")
        texts[number], kinds[number] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for number, one in added.items():
        texts[number] = one["content"]
        kinds[number] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    if model["byte_fallback"] and tokenizer.unk_token_id is not None:  # elsewhere it is often that of the end
        kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    _special_tokens(writer, tokenizer)


def _byte_level(writer: Any, rules: Any, _: Any, merges: list[tuple[str, ...]], __: int) -> None:
    cut = rules["pre_tokenizer"] or {}
    steps = [{k: v for k, v in one.items() if k != "trim_offsets"} for one in cut.get("pretokenizers", [cut])]
    found = (steps, bool(rules["model"]["ignore_merges"]))
    name = next((name for name, known in _CUTS.items() if known == found), None)
    if name is None or rules["normalizer"] is not None:
        _refuse(f"the pre-tokenizer {cut} (ignore_merges={found[1]}, normalizer={rules['normalizer']})")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(pair) for pair in merges])


def _pieces(writer: Any, rules: Any, ids: dict[str, int], merges: list[tuple[str, ...]], size: int) -> None:
    """SentencePiece: llama.cpp joins, of neighbours that make a token, those whose token has the most score.

    Merges do the same if every two tokens that make one are a merge, and those that make the same one come
    together: then the rank of its first merge is its score.
    """
    normal, cut = rules["normalizer"] or {}, rules["pre_tokenizer"]
    steps = normal.get("normalizers", [normal])
    if not normal and cut in [{**_METASPACE, "prepend_scheme": scheme} for scheme in _SCHEMES]:
        steps = _SPACES if cut["prepend_scheme"] == "never" else _PREFIXED + _SPACES
        if len(steps) > 1:
            warnings.warn(
                "where a text begins with a space, and after special tokens in it, llama.cpp puts one space "
                "more than this tokenizer; elsewhere both give the same tokens.",
                stacklevel=2,
            )
    elif cut is not None or steps not in (_SPACES, _PREFIXED + _SPACES):
        _refuse(f"the normalizer {normal} and the pre-tokenizer {cut}")
    made, ranks = ["".join(pair) for pair in merges], dict[str, int]()
    for rank, text in enumerate(made):
        ranks.setdefault(text, rank)
    together = all(ranks[text] == rank or made[rank - 1] == text for rank, text in enumerate(made))
    splits = {(text[:i], text[i:]) for text in ids for i in range(1, len(text))}
    if not together or any(a in ids and b in ids for a, b in splits.difference(merges)):
        _refuse("merges that are not those of a SentencePiece model")
    scores = [0.0] * size
    for text, rank in ranks.items():
        scores[ids[text]] = -float(rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(len(steps) > 1)
    writer.add_token_scores(scores)


def _special_tokens(writer: Any, tokenizer: Any) -> None:
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(first is not None and around[0] == first)
    writer.add_add_eos_token(last is not None and around[-1] == last)
    numbers = {
        writer.add_bos_token_id: last if first is None else first,  # llama.cpp would have one of its own
        writer.add_eos_token_id: first if last is None else last,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, number in numbers.items():
        if number is not None:
            add(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"the tokenizer has {what}; that llama.cpp gives the same tokens is not known. Leave the tokenizer "
        "out for a file without a vocabulary, which runs on token ids."
    )
