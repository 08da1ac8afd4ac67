"""Turn a checkpoint's tokenizer into a vocabulary of llama.cpp, or refuse it: nothing is approximated.

llama.cpp knows two kinds that this model family uses. `llama` is SentencePiece's BPE with byte fallback: it joins the two
neighbours whose joint piece has the highest score, so that minus the rank of a merge says the same as the list of merges. `gpt2`
is byte-level BPE with the merges themselves and a named rule that cuts the text into words.

Source: llama-vocab.cpp of llama.cpp, `llm_tokenizer_spm_session` and `llm_tokenizer_bpe_session`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from finetune.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# llama.cpp's names for the ways to cut a text into words that its source has, and that `tokenizers` can say.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = (
    ("gpt-2", (_BYTE_LEVEL,)),
    ("starcoder", (_DIGITS, _BYTE_LEVEL)),
)


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as a GGUF file holds it: one piece, type and score for each token of the tokenizer.

    `words` names the rule that cuts a text into words and `merges` holds the merges; only the model `gpt2` has them.
    `adds_space` says whether a space is put before the text behind a control token.
    """

    model: str
    words: str
    pieces: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    adds_space: bool
    adds_bos: bool
    adds_eos: bool


def read_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return the vocabulary of the tokenizer as transformers uses it, which is what a model was trained with.

    Raises:
        ExportError: llama.cpp cannot express this tokenizer; the message lists the reasons.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    faults = _list_model_faults(content)
    is_byte_level = not model.get("byte_fallback")
    words, adds_space = "default", False
    if not faults and is_byte_level:
        words, faults = _find_words(content)
    elif not faults:
        adds_space, faults = _find_space(content)
    adds_bos, adds_eos, added_faults = _find_added_ids(tokenizer)
    faults += added_faults
    if faults:
        _refuse(folder, faults)
    pieces, types = _list_pieces(folder, content, tokenizer.unk_token_id)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    scores = (0.0,) * len(pieces) if is_byte_level else _score_pieces(folder, pieces, merges)
    joined = tuple(" ".join(pair) for pair in merges) if is_byte_level else ()
    name = "gpt2" if is_byte_level else "llama"
    return Vocabulary(name, words, pieces, types, scores, joined, adds_space, adds_bos, adds_eos)


def _refuse(folder: Path, faults: Sequence[str]) -> None:
    more = f" … and {len(faults) - 4} more" if len(faults) > 4 else ""
    raise ExportError(
        f"{folder}: llama.cpp cannot express this tokenizer: {'; '.join(faults[:4])}{more}. A GGUF file would give other tokens than "
        "were trained; serve the folder with a program that reads tokenizer.json"
    )


def _list_model_faults(content: Mapping[str, Any]) -> list[str]:
    model = content["model"]
    if model.get("type") != "BPE":
        return [f"its model is {model.get('type')}; BPE is known"]
    expected: dict[str, Sequence[Any]] = {
        "dropout": (None, 0.0),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "ignore_merges": (None, False),
    }
    faults = [f"{key} is {model.get(key)!r}" for key, known in expected.items() if model.get(key) not in known]
    for token in content["added_tokens"]:
        marks = [key for key in ("lstrip", "rstrip", "single_word") if token[key]]
        # Without a normalizer it makes no difference whether a token is looked for before or after normalizing.
        marks += ["normalized"] if token["normalized"] and content["normalizer"] else []
        faults += [f"the added token {token['content']!r} is {mark}" for mark in marks]
    if model.get("byte_fallback") and (missing := [piece for piece in _BYTES if piece not in model["vocab"]]):
        faults.append(f"it has no token for {len(missing)} bytes (first: {missing[0]})")
    return faults


def _list_parts(value: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    return list(value[key]) if value["type"] == "Sequence" else [dict(value)]


def _find_words(content: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return llama.cpp's name for the way in which a byte-level tokenizer cuts a text into words."""
    if content["normalizer"] is not None:
        return "", [f"its normalizer is {content['normalizer']['type']}; none is known beside byte-level BPE"]
    parts = _list_parts(content["pre_tokenizer"], "pretokenizers")
    bare = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    for name, rule in _WORDS:
        if bare == list(rule):
            return name, []
    found = ", ".join(part["type"] for part in parts) or "none"
    return "", [f"its pre-tokenizer ({found}) cuts words in a way that has no name there"]


def _find_space(content: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Return whether a tokenizer of SentencePiece's kind puts a space before a text, also behind a control token.

    transformers 5 says `legacy: true` as Metaspace, which puts no second space before a text that begins with one. llama.cpp,
    transformers 4 and tokenizer.json itself put it there. The tokens of all other texts are the same.
    """
    words, parts = content["pre_tokenizer"], _list_parts(content["normalizer"], "normalizers")
    if words is None and parts in ([_PREPEND, _REPLACE], [_REPLACE]):
        return _PREPEND in parts, []
    if words is None or parts:
        names = ", ".join(part["type"] for part in [*parts, *([words] if words else [])]) or "nothing"
        return False, [f"it changes a text by {names}; Prepend and Replace, or Metaspace alone, are known"]
    scheme = words.get("prepend_scheme")
    if words["type"] == "Metaspace" and words["replacement"] == _SPACE and not words["split"] and scheme != "first":
        return scheme == "always", []
    return False, [
        "it puts a space before the first text only (`legacy: false`), and llama.cpp puts it behind each control token"
        if scheme == "first"
        else f"its pre-tokenizer is {words['type']}; Metaspace that does not split is known"
    ]


def _find_added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool, list[str]]:
    """Return whether bos and eos are put around a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    for adds_bos in (False, True):
        for adds_eos in (False, True):
            if ids == [tokenizer.bos_token_id] * adds_bos + bare + [tokenizer.eos_token_id] * adds_eos:
                return adds_bos, adds_eos, []
    return False, False, ["it puts other tokens than bos and eos around a text"]


def _list_pieces(
    folder: Path, content: Mapping[str, Any], unknown: int | None
) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Return the pieces by their ids, with their types; gaps become unused tokens."""
    found: dict[int, tuple[str, TokenType]] = {}
    model = content["model"]
    for piece, number in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and piece in _BYTE_SET
        found[number] = (piece, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in content["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        found[token["id"]] = (token["content"], kind)
    if unknown in found:
        found[unknown] = (found[unknown][0], TokenType.UNKNOWN)
    size = max(found) + 1
    rows = [found.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    pieces = tuple(piece for piece, _ in rows)
    if len(set(pieces)) != size:
        _refuse(folder, ["two of its tokens have the same text"])
    return pieces, tuple(kind for _, kind in rows)


_BYTE_SET = frozenset(_BYTES)


def _score_pieces(folder: Path, pieces: Sequence[str], merges: Sequence[tuple[str, ...]]) -> tuple[float, ...]:
    """Return for each piece minus the rank of the merge that ends it, 0 for pieces that no merge makes.

    llama.cpp joins any two neighbours whose joint text is a piece, also where no merge joins them, and by one rank a piece. It
    gives the same tokens as the merges if, and only if, no piece is made of two others that stay apart there. What is merged inside
    of a piece does not depend on its neighbours until it is whole, so each piece alone shows how it is always made.

    Raises:
        ExportError: llama.cpp would join two pieces that the merges leave apart.
    """
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    known, scores, faults = set(pieces), [], []
    for piece in pieces:
        parts, last = list(piece), 0
        while all(part in known for part in parts):
            rank, place = min(
                ((ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks), default=(-1, 0)
            )
            if rank < 0:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            last = rank
        scores.append(-float(last) if len(parts) == 1 else 0.0)
        if len(parts) == 2 and all(part in known for part in parts):
            faults.append(f"{piece!r} would be joined from {parts[0]!r} and {parts[1]!r}, which its merges leave apart")
    if faults:
        _refuse(folder, faults)
    return tuple(scores)
