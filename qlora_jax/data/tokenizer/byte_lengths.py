"""Which texts a tokenizer certainly round_trips, told without decoding them, which would take as long as masks do."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int64

from qlora_jax.data.tokenizer.from_gguf import SPACE

Prefix = Literal["never", "first", "every"]

_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_SPELL = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

# What the normalizer and the pre-tokenizer do: where they put a space that the text does not have. Gemma's split finds
# no space, since they are spelt out by then.
_STEPS: list[tuple[Any, Any, Prefix]] = [
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
    """Where such a tokenizer puts a space before a text: never, before all of it, or behind every added token too.

    None for a tokenizer of another kind, or one that lacks a byte.
    """
    model, decoder = backend.model, _state(backend.decoder) or {}
    if not (
        isinstance(model, tokenizers.models.BPE)
        and model.byte_fallback
        and not (model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix)
        and all(backend.token_to_id(byte) is not None for byte in _BYTES)
        and decoder.get("decoders") in (_DECODE, [*_DECODE, _STRIP])
    ):
        return None
    steps = _state(backend.normalizer), _state(backend.pre_tokenizer)
    return next((prefix for *known, prefix in _STEPS if tuple(known) == steps), None)


def _round_trips_spelled(text: str) -> bool:
    """Whether the text has nothing in it that is spelt like a space or a byte, and so would be taken for one."""
    return SPACE not in text and "<0x" not in text


def token_byte_count(token: str) -> int:
    """Bytes of text that a token of the vocabulary stands for."""
    return 1 if token in _BYTES else len(token.replace(SPACE, " ").encode())


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


# A byte-level vocabulary has a letter for each byte: itself where it can be seen, else one from 256 on.
_SEEN = {*range(33, 127), *range(161, 173), *range(174, 256)}
_KEEPING = {"ByteLevel", "Digits", "Sequence", "Split"}


class ByteLengths(NamedTuple):
    """How many bytes of a text that is kept each id stands for.

    Fields:
      of_ids: of each id.
      added: which ids are added tokens.
      prefix: where one byte fewer is there, since the tokenizer has put a space (byte_lengths.py).
    """

    of_ids: Int64[np.ndarray, " vocab"]
    added: Bool[np.ndarray, " vocab"]
    prefix: Prefix


def make_round_trips(backend: tokenizers.Tokenizer) -> Callable[[str], bool]:
    """`round_trips(text)`: true only if the ids of `text` decode to it, spaces around special tokens aside.

    That is known of byte-level BPE (without a normalizer, or with NFC for texts in that form), of characters whose
    bytes all have a token, and of BPE that spells spaces out (byte_lengths.py). Of other tokenizers nothing is known.
    """
    if space_prefix(backend) is not None:
        return _round_trips_spelled
    missing = [byte for byte, letter in _letters() if backend.token_to_id(letter) is None]
    if not is_byte_level(backend) or any(0x80 <= byte < 0xC0 for byte in missing):
        return lambda text: False
    ranges = "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in map(_characters, missing))
    lost, lost_ascii = re.compile(f"[{ranges}]" if ranges else "(?!)"), [chr(byte) for byte in missing if byte < 0x80]
    any_form = backend.normalizer is None

    def round_trips(text: str) -> bool:
        if text.isascii():  # which is quicker to search, and in every form
            return not any([letter in text for letter in lost_ascii])
        return (any_form or unicodedata.is_normalized("NFC", text)) and not lost.search(text)

    return round_trips


def byte_lengths(backend: tokenizers.Tokenizer) -> ByteLengths | None:
    """Bytes that ids stand for in a text that is kept; None where some bytes of a text may have no id.

    That is where nothing is known of the tokenizer, where an added token takes the spaces around it, and where a
    byte-level one puts a space before every text.
    """
    added, prefix = backend.get_added_tokens_decoder(), space_prefix(backend)
    # Those that are normalized may be found with a space put before them.
    if any(token.lstrip or token.rstrip or (prefix and token.normalized) for token in added.values()):
        return None
    if not prefix and not is_byte_level(backend):
        return None
    tokens = [backend.id_to_token(token) or "" for token in range(backend.get_vocab_size(with_added_tokens=True))]
    # A byte-level vocabulary has a letter a byte.
    lengths = np.array([token_byte_count(token) if prefix else len(token) for token in tokens], np.int64)
    for token, text in added.items():
        lengths[token] = len(text.content.encode())
    if not prefix and lengths[backend.encode("a", add_special_tokens=False).ids].sum() != 1:
        return None
    return ByteLengths(lengths, np.isin(np.arange(len(lengths)), list(added)), prefix or "never")


def _letters() -> Iterator[tuple[int, str]]:
    """(byte, its letter) of each byte that UTF-8 uses."""
    unseen = iter(range(256, 512))
    for byte in range(256):
        letter = chr(byte if byte in _SEEN else next(unseen))
        if byte not in (0xC0, 0xC1) and byte < 0xF5:
            yield byte, letter


def _characters(byte: int) -> tuple[int, int]:
    """The first and last character whose first byte it is."""
    if byte < 0x80:
        return byte, byte
    begin, size = next(
        (mark, size) for mark, size in ((0xF0, 1 << 18), (0xE0, 1 << 12), (0xC0, 1 << 6)) if byte >= mark
    )
    first = (byte - begin) * size
    return first, min(first + size - 1, 0x10FFFF)


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether it is BPE over the bytes of a text, split but nothing taken away."""
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


def _splits_only(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether it ends in bytes and takes nothing away before."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return steps[-1]["type"] == "ByteLevel" and all(
        step["type"] in _KEEPING and step.get("behavior") != "Removed" for step in steps
    )
