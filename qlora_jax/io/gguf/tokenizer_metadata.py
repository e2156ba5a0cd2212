"""Translates tokenizers from and to GGUF metadata."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.data.tokenizer.gguf_tokenizer import (
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
from qlora_jax.io.gguf.header import Metadata
from qlora_jax.model_source import TokenizerData
from qlora_jax.untrusted_json import JsonObject

PREFIX = "tokenizer.ggml."
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id")
NO_TOKEN = 2**32 - 1  # -1 as an unsigned id
STOP_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# If a file has no add_bos_token, llama.cpp derives it from the kind of vocabulary.
MODELS_WITH_BOS = {"llama"}
PRES_WITH_BOS = {"llama3", "llama-v3", "llama-bpe"}
# Architectures whose vocabulary is ordered by merges; their scores are not used.
ORDERED = {"gemma", "gemma2", "gemma3"}


def tokenizer_from_metadata(path: Path, metadata: Metadata) -> TokenizerData:
    """Reads the special tokens, the chat template and the vocabulary.

    Raises:
      ValueError: the vocabulary is missing, or a special token's id is outside it.
    """
    keys = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    missing = [f"{PREFIX}{key}" for key in ("model", "tokens") if key not in keys]
    if missing:
        raise ValueError(f"{path}: the tokenizer is missing ({', '.join(missing)}). Get a GGUF file with its tokenizer")
    tokens = keys["tokens"]
    ids = {key: keys[key] for key in (*SPECIAL_IDS, *STOP_IDS) if keys.get(key, NO_TOKEN) != NO_TOKEN}
    outside = [f"{PREFIX}{key} = {number}" for key, number in ids.items() if not 0 <= number < len(tokens)]
    if outside:
        raise ValueError(f"{path}: corrupt: ids outside the vocabulary of {len(tokens)} tokens: {', '.join(outside)}")
    bos, eos, pad, unk = (tokens[ids[key]] if key in ids else None for key in SPECIAL_IDS)
    with_bos = keys["model"] in MODELS_WITH_BOS or keys.get("pre") in PRES_WITH_BOS
    return {
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "chat_template": metadata.get("tokenizer.chat_template"),
        "template_name": f"{path}: tokenizer.chat_template",
        "add_bos_token": keys.get("add_bos_token", with_bos),
        "stop_token_ids": [ids[key] for key in STOP_IDS if key in ids],
        "gguf": {
            "model": keys["model"],
            "pre": keys.get("pre", "default"),
            "tokens": keys["tokens"],
            "token_type": keys.get("token_type", []),
            "merges": keys.get("merges", []),
            "scores": [] if (metadata["general.architecture"] in ORDERED) else keys.get("scores", []),
            "add_space_prefix": keys.get("add_space_prefix", keys["model"] in MODELS_WITH_BOS),
        },
    }


# Translates a tokenizer to GGUF metadata, the inverse of data/tokenizer/gguf_tokenizer.
#
# Vocabularies are "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE). The metadata is read back, and must give
# the same ids as the tokenizer.

# Any two known ways of splitting text differ on at least one of these texts.
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
MAX_ADDED = 64  # the number of added tokens that are tested inside other text
WORDS_WITH_MARKS = {"gpt-4o", "tekken"}  # llama.cpp's patterns for them have only letters
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
STOP_KEYS = tuple(f"{PREFIX}{key}" for key in ("eos_token_id", "eot_token_id", "eom_token_id"))


def tokenizer_metadata(
    tokenizer: Tokenizer, size: int, stop: Sequence[int], architecture: str
) -> tuple[JsonObject, list[str]]:
    """Returns (metadata, notes on how readers of the file will tokenize differently).

    Args:
      size: rows of the model's embedding; ids without a token get an unused one.
      stop: ids that end a reply.
      architecture: the file's architecture.

    Raises:
      ValueError: the vocabulary is not BPE, or the file would give other ids for plain text.
    """
    parsed = json.loads(tokenizer.to_json())
    model, added = parsed["model"], {token["id"]: token for token in parsed.get("added_tokens", [])}
    by_id = {number: token for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [NORMAL if number in by_id else UNUSED for number in range(size)]
    for number, token in added.items():
        kinds[number] = CONTROL if token["special"] else USER_DEFINED
    if model["type"] != "BPE":
        raise ValueError(
            f"the tokenizer's model cannot be written to GGUF (found {model['type']}, expected BPE, byte-level or "
            "SentencePiece's). Export with --format hf"
        )
    keys = (_sentencepiece if model.get("byte_fallback") else _byte_level)(tokenizer, model, tokens, kinds)
    keys |= {"add_bos_token": tokenizer.add_bos_token, **_special_ids(tokenizer)}
    metadata = {f"{PREFIX}{key}": value for key, value in keys.items()}
    metadata |= dict(zip(STOP_KEYS, _stops(tokenizer, stop), strict=False))
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    source = tokenizer_from_metadata(Path("tokenizer"), metadata | {"general.architecture": architecture})
    read = load_tokenizer(source)
    kind = keys["model"]
    wrong = [text for text in PROBES if read.encode(text) != tokenizer.encode(text)]
    if wrong:
        raise ValueError(
            f"the tokenizer cannot be written to GGUF metadata: a vocabulary of kind {kind!r} would give other ids for "
            f"{len(wrong)} of {len(PROBES)} texts, such as {wrong[0]!r}. Export with --format hf"
        )
    found = {token["content"] for token in added.values()} | ({model["unk_token"]} if model.get("unk_token") else set())
    return metadata, _notes(
        tokenizer, read, keys["pre"], sorted(found)[:MAX_ADDED], _stops(tokenizer, stop)[len(STOP_KEYS) :]
    )


def _byte_level(tokenizer: Tokenizer, model: JsonObject, tokens: list[str], kinds: list[int]) -> JsonObject:
    pre = known_pre_of(tokenizer.backend, bool(model.get("ignore_merges")), PROBES)
    if pre is None:
        raise ValueError(
            "the tokenizer splits text in a way that no known value of tokenizer.ggml.pre describes, so llama.cpp "
            "would split it differently. Export with --format hf, and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}


def _sentencepiece(tokenizer: Tokenizer, model: JsonObject, tokens: list[str], kinds: list[int]) -> JsonObject:
    """The keys of a SentencePiece vocabulary, with scores that preserve the order of merges.

    SentencePiece's own scores are not in tokenizer.json.
    """
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
        # User-defined tokens are searched in the raw text, which contains spaces.
        "tokens": [t.replace(SPACE, " ") if k == USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)],
        "token_type": kinds,
        "scores": [-float(ranks.get(token, last)) for token in tokens],
        "add_space_prefix": tokenizer.backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE),
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    named = {
        "bos_token_id": tokenizer.bos_id,
        "padding_token_id": tokenizer.pad_id,
        "unknown_token_id": tokenizer.unk_id,
    }
    return {key: number for key, number in named.items() if number is not None}


def _stops(tokenizer: Tokenizer, stop: Sequence[int]) -> list[int]:
    first = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return list(dict.fromkeys([*first, *stop]))


def _notes(tokenizer: Tokenizer, read: Tokenizer, pre: str, added: Sequence[str], unlisted: Sequence[int]) -> list[str]:
    contexts = {token: (f"a {token} b\n", token, f"{token}\nb") for token in added}
    other = [token for token, texts in contexts.items() if any(read.encode(t) != tokenizer.encode(t) for t in texts)]
    notes = _differences_in_llama_cpp(tokenizer, pre)
    if other:
        notes.append(f"text next to these tokens may get other ids from the file than from tokenizer.json: {other}")
    if unlisted:
        names = [tokenizer.backend.id_to_token(number) for number in unlisted]
        notes.append(f"a GGUF file can list {len(STOP_KEYS)} tokens that end a reply, so these are not listed: {names}")
    return notes


def _differences_in_llama_cpp(tokenizer: Tokenizer, pre: str) -> list[str]:
    """Returns notes on texts that llama.cpp gives other ids, though it reads the same vocabulary."""
    notes = []
    if KNOWN_PRE.get(pre, KNOWN_PRE["gpt-2"]).normalizer:
        notes.append(
            "llama.cpp does not compose characters (NFC), but this tokenizer does: text with combining accents gets "
            "other ids there"
        )
    if pre in WORDS_WITH_MARKS:
        notes.append(
            "llama.cpp splits words at combining marks, but this tokenizer does not: text with them may get other ids"
        )
    added = tokenizer.backend.get_added_tokens_decoder().values()
    runs = [len(token.content) for token in added if token.content and set(token.content) == {SPACE}]
    if runs:
        notes.append(
            f"llama.cpp gives more than {max(runs)} spaces in a row other ids: it takes the longest token first, and "
            "this tokenizer merges pairs"
        )
    return notes
