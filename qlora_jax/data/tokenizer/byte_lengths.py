"""Finds texts that round-trip and the byte length of each id, without decoding, which takes as long as masks.

A text round-trips if its ids decode to the same text. Two families of tokenizers are known: byte-level BPE, and BPE of
SentencePiece, which writes a space as the character SPACE. For other tokenizers nothing is known.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import tokenizers
from jaxtyping import Bool, Int64

from qlora_jax.data.tokenizer.gguf_tokenizer import SPACE

# Where a tokenizer adds a space: never, before a text, or also after every added token.
Prefix = Literal["never", "first", "every"]


class _State(TypedDict):
    """JSON of a normalizer, pre-tokenizer or decoder: the keys that are read here."""

    type: str
    behavior: NotRequired[str]
    pretokenizers: NotRequired[list["_State"]]
    decoders: NotRequired[list[Mapping[str, object]]]


_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SPELL = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

# (normalizer, pre-tokenizer, where they add a space). Gemma's split finds no space: the normalizer has replaced them.
_STEPS: list[tuple[Mapping[str, object] | None, Mapping[str, object] | None, Prefix]] = [
    ({"type": "Sequence", "normalizers": [_PREPEND, _SPELL]}, None, "every"),
    (_SPELL, None, "never"),
    (_SPELL, _SPLIT, "never"),
    (None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}, "first"),
    (None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}, "never"),
]
_DECODE = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def space_prefix(backend: tokenizers.Tokenizer) -> Prefix | None:
    """Returns where a SentencePiece tokenizer adds a space; None for other tokenizers, or one that lacks a byte."""
    model, decoder = backend.model, _state(backend.decoder)
    if not (
        isinstance(model, tokenizers.models.BPE)
        and model.byte_fallback
        and not (model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix)
        and all(backend.token_to_id(byte) is not None for byte in _BYTES)
        and decoder is not None
        and decoder.get("decoders") in (_DECODE, [*_DECODE, _STRIP])
    ):
        return None
    steps = _state(backend.normalizer), _state(backend.pre_tokenizer)
    return next((prefix for *known, prefix in _STEPS if tuple(known) == steps), None)


def _round_trips_sentencepiece(text: str) -> bool:
    """Returns True if the text contains nothing that SentencePiece would read as a space or a byte."""
    return SPACE not in text and "<0x" not in text


def token_byte_count(token: str) -> int:
    """Returns the bytes of text that a token of a SentencePiece vocabulary stands for."""
    return 1 if token in _BYTES else len(token.replace(SPACE, " ").encode())


def _state(
    part: tokenizers.normalizers.Normalizer
    | tokenizers.pre_tokenizers.PreTokenizer
    | tokenizers.decoders.Decoder
    | None,
) -> _State | None:
    return None if part is None else json.loads(part.__getstate__())


# A byte-level vocabulary has a letter for each byte: the byte's character if it is printable, else one from 256 on.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_LOSSLESS = {"ByteLevel", "Digits", "Sequence", "Split"}


class ByteLengths(NamedTuple):
    """Bytes that each id stands for in a text that round-trips.

    Fields:
      of_ids: bytes of each id.
      added: True for ids of added tokens.
      prefix: where an id stands for one byte fewer, because the tokenizer added a space.
    """

    of_ids: Int64[np.ndarray, " vocab"]
    added: Bool[np.ndarray, " vocab"]
    prefix: Prefix


def make_round_trips(backend: tokenizers.Tokenizer) -> Callable[[str], bool]:
    """Returns a function of a text that is True only if its ids decode to it, except spaces at special tokens.

    For byte-level BPE, every byte of the text needs a token. With an NFC normalizer, the text has to be in NFC.
    """
    if space_prefix(backend) is not None:
        return _round_trips_sentencepiece
    missing = [byte for byte, letter in _letters() if backend.token_to_id(letter) is None]
    if not is_byte_level(backend) or any(0x80 <= byte < 0xC0 for byte in missing):
        return lambda text: False
    ranges = "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in map(_characters, missing))
    lost, lost_ascii = re.compile(f"[{ranges}]" if ranges else "(?!)"), [chr(byte) for byte in missing if byte < 0x80]
    no_normalizer = backend.normalizer is None

    def round_trips(text: str) -> bool:
        if text.isascii():  # faster to search, and always in NFC
            return not any([letter in text for letter in lost_ascii])
        return (no_normalizer or unicodedata.is_normalized("NFC", text)) and not lost.search(text)

    return round_trips


def byte_lengths(backend: tokenizers.Tokenizer) -> ByteLengths | None:
    """Returns the bytes that ids stand for in a text that round-trips; None if some bytes may have no id.

    Returns None for unknown tokenizers, for added tokens that take the spaces around them, and for byte-level
    tokenizers that add a space before every text.
    """
    added, prefix = backend.get_added_tokens_decoder(), space_prefix(backend)
    # Normalized added tokens may be found with an added space before them.
    if any(token.lstrip or token.rstrip or (prefix and token.normalized) for token in added.values()):
        return None
    if not prefix and not is_byte_level(backend):
        return None
    tokens = [backend.id_to_token(token) or "" for token in range(backend.get_vocab_size(with_added_tokens=True))]
    # A byte-level vocabulary has one letter per byte.
    lengths = np.array([token_byte_count(token) if prefix else len(token) for token in tokens], np.int64)
    for token, text in added.items():
        # SPACE in an added token is a space of the text: a text that contains SPACE itself does not round-trip.
        lengths[token] = token_byte_count(text.content) if prefix else len(text.content.encode())
    if not prefix and lengths[backend.encode("a", add_special_tokens=False).ids].sum() != 1:
        return None
    return ByteLengths(lengths, np.isin(np.arange(len(lengths)), list(added)), prefix or "never")


def make_token_bytes(backend: tokenizers.Tokenizer) -> Callable[[int], bytes]:
    """Returns a function of an id: the bytes of text that it stands for, which may be a part of a character."""
    added, bytes_of = backend.get_added_tokens_decoder(), {letter: byte for byte, letter in _all_letters()}
    byte_level, sentencepiece = is_byte_level(backend), space_prefix(backend) is not None

    def token_bytes(token: int) -> bytes:
        text = backend.id_to_token(token) or ""
        if token in added:
            return text.encode()
        if byte_level:
            return bytes(bytes_of[letter] for letter in text)
        if sentencepiece:
            return bytes([int(text[3:5], 16)]) if text in _BYTES else text.replace(SPACE, " ").encode()
        return backend.decode([token], skip_special_tokens=False).encode()

    return token_bytes


def _letters() -> Iterator[tuple[int, str]]:
    """Yields (byte, its letter) of each byte that UTF-8 uses."""
    return ((byte, letter) for byte, letter in _all_letters() if byte not in (0xC0, 0xC1) and byte < 0xF5)


def _all_letters() -> Iterator[tuple[int, str]]:
    """Yields (byte, its letter) of each byte."""
    others = iter(range(256, 512))
    return ((byte, chr(byte if byte in _PRINTABLE else next(others))) for byte in range(256))


def _characters(byte: int) -> tuple[int, int]:
    """Returns the first and the last character whose encoding begins with `byte`."""
    if byte < 0x80:
        return byte, byte
    begin, size = next(
        (start, size) for start, size in ((0xF0, 1 << 18), (0xE0, 1 << 12), (0xC0, 1 << 6)) if byte >= start
    )
    first = (byte - begin) * size
    return first, min(first + size - 1, 0x10FFFF)


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Returns True for BPE over the bytes of a text that drops nothing when it splits."""
    model = backend.model
    return (
        isinstance(model, tokenizers.models.BPE)
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and (backend.normalizer is None or isinstance(backend.normalizer, tokenizers.normalizers.NFC))
        and isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        and backend.pre_tokenizer is not None
        and _splits_only(json.loads(backend.pre_tokenizer.__getstate__()))
    )


def _splits_only(pre_tokenizer: _State) -> bool:
    """Returns True if the pre-tokenizer ends with bytes and drops nothing before."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return steps[-1]["type"] == "ByteLevel" and all(
        step["type"] in _LOSSLESS and step.get("behavior") != "Removed" for step in steps
    )
