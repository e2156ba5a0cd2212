"""Turns a tokenizer into the tokenizer's part of GGUF metadata: the inverse of data/gguf_tokenizer.

Vocabularies of kind "gpt2" (byte-level BPE) and "llama" (SentencePiece's BPE). What is written is read back, and has to
give the ids that the tokenizer gives.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data.tokenizer.from_gguf import (
    BYTE,
    CONTROL,
    KNOWN_PRE,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    known_pre_of,
)
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.io.gguf.tokenizer_reader import PREFIX, tokenizer_from_metadata

# Every way of splitting text that is known differs from every other on one of these.
PROBES = (
    "Hello, world! It's 3 o'clock; I'll say WE'RE here, 'DON'T you?",
    "1234567 12 3.14 x=1_000\n\n\n    5\t\t7\r\n  \r\n",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # ok\n",
    "Stra\u00dfe, nai\u0308ve caf\u00e9, \ufb01 e\u0301; \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 42",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u6d4b\u8bd5123\u3002\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u05e9\u05dc\u05d5\u05dd "
    "\u0661\u0662\u0663 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 ok\U0001f44d\U0001f3fd5 camelCaseWords HTTPServer// path/to/file.py:10",
    "   leading and trailing   ",
)
MAX_ADDED = 64  # of the added tokens, so many are looked at among other text
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def vocabulary_of(
    tokenizer: Tokenizer, size: int, stop: Sequence[int], architecture: str
) -> tuple[dict[str, Any], list[str]]:
    """(metadata, what a reader will do otherwise than the tokenizer).

    Args:
      size: rows of the model's embedding; ids that have no token get one that is not used.
      stop: ids that end a reply.
      architecture: the file's.

    Raises:
      ValueError: a vocabulary of another kind, more tokens than rows, or ids of plain text that would be others.
    """
    parsed = json.loads(tokenizer.to_json())
    model, added = parsed["model"], {token["id"]: token for token in parsed.get("added_tokens", [])}
    tokens, kinds = _tokens(tokenizer, added, size)
    if model["type"] != "BPE":
        raise ValueError(
            f"the tokenizer's model is {model['type']}: a GGUF file holds BPE, byte-level or SentencePiece's. "
            "Export with --format hf"
        )
    keys = (_sentencepiece if model.get("byte_fallback") else _byte_level)(tokenizer, model, tokens, kinds)
    keys |= {"add_bos_token": tokenizer.add_bos_token, **_special_ids(tokenizer, stop)}
    metadata = {f"{PREFIX}{key}": value for key, value in keys.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    source = tokenizer_from_metadata(Path("tokenizer"), metadata | {"general.architecture": architecture})
    read = load_tokenizer(source)
    _check_ids(tokenizer, read, keys["model"])
    texts = [token["content"] for token in added.values() if token["content"] != model.get("unk_token")]
    return metadata, _notes(tokenizer, read, keys["pre"], texts[:MAX_ADDED], _stops(tokenizer, stop)[len(STOPS) :])


def _tokens(tokenizer: Tokenizer, added: Mapping[int, Any], size: int) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    if outside := {token: number for number, token in by_id.items() if number >= size}:
        raise ValueError(
            f"the tokenizer has {len(outside)} tokens beyond the {size} rows of the model's embedding, such as "
            f"{list(outside.items())[:5]}: this tokenizer is another model's"
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [NORMAL if number in by_id else UNUSED for number in range(size)]
    for number, token in added.items():
        kinds[number] = CONTROL if token["special"] else USER_DEFINED
    return tokens, kinds


def _byte_level(tokenizer: Tokenizer, model: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    pre = known_pre_of(tokenizer.backend, bool(model.get("ignore_merges")), PROBES)
    if pre is None:
        raise ValueError(
            "the tokenizer splits text in a way that no known value of tokenizer.ggml.pre stands for, so llama.cpp "
            "would split it otherwise. Export with --format hf, and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}


def _sentencepiece(
    tokenizer: Tokenizer, model: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """Scores are those that order the merges as they are: tokenizer.json does not hold SentencePiece's own."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    ranks: dict[str, int] = {}
    for first, second in pairs:
        ranks.setdefault(first + second, len(ranks))
    last = len(ranks)
    special = {model.get("unk_token"): UNKNOWN, **{t: BYTE for t in tokens if BYTE_TOKEN.fullmatch(t)}}
    kinds = [special.get(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
    return {
        "model": "llama",
        "pre": "default",
        # A symbol of the user's is looked for in the text itself.
        "tokens": [t.replace(SPACE, " ") if k == USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)],
        "token_type": kinds,
        "scores": [-float(ranks.get(token, last)) for token in tokens],
        "add_space_prefix": tokenizer.backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE),
    }


def _special_ids(tokenizer: Tokenizer, stop: Sequence[int]) -> dict[str, int]:
    named = {
        "bos_token_id": tokenizer.bos_id,
        "padding_token_id": tokenizer.pad_id,
        "unknown_token_id": tokenizer.unk_id,
    }
    present = {key: number for key, number in named.items() if number is not None}
    return present | dict(zip(STOPS, _stops(tokenizer, stop), strict=False))


def _stops(tokenizer: Tokenizer, stop: Sequence[int]) -> list[int]:
    first = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return list(dict.fromkeys([*first, *stop]))


def _check_ids(tokenizer: Tokenizer, read: Tokenizer, kind: str) -> None:
    wrong = [text for text in PROBES if read.encode(text) != tokenizer.encode(text)]
    if wrong:
        raise ValueError(
            f"the tokenizer can't be said in GGUF metadata: a vocabulary of kind {kind!r} would give {len(wrong)} of "
            f"{len(PROBES)} texts other ids, such as {wrong[0]!r}. Export with --format hf"
        )


def _notes(tokenizer: Tokenizer, read: Tokenizer, pre: str, added: Sequence[str], unsaid: Sequence[int]) -> list[str]:
    beside = {token: (f"a {token} b\n", token, f"{token}\nb") for token in added}
    other = [token for token, texts in beside.items() if any(read.encode(t) != tokenizer.encode(t) for t in texts)]
    notes = []
    if KNOWN_PRE.get(pre, KNOWN_PRE["gpt-2"]).normalizer:
        notes.append(
            "llama.cpp does not compose characters, as this tokenizer does (NFC): text with accents apart from their "
            "letters gets other ids there"
        )
    if other:
        notes.append(f"text beside these tokens may get other ids from the file than from tokenizer.json: {other}")
    if unsaid:
        names = [tokenizer.backend.id_to_token(number) for number in unsaid]
        notes.append(f"a GGUF file names {len(STOPS)} tokens that end a reply; these it does not: {names}")
    return notes
