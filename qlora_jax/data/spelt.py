"""What is known of tokenizers that spell spaces out, as SentencePiece's BPE does (Llama 2, Mistral, Gemma)."""

import json
from typing import Any, Literal

import tokenizers

from qlora_jax.data.gguf_tokenizer import SPACE

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


def prefix_of(backend: tokenizers.Tokenizer) -> Prefix | None:
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


def keeps(text: str) -> bool:
    """Whether the text has nothing in it that is spelt like a space or a byte, and so would be taken for one."""
    return SPACE not in text and "<0x" not in text


def size_of(token: str) -> int:
    """Bytes of text that a token of the vocabulary stands for."""
    return 1 if token in _BYTES else len(token.replace(SPACE, " ").encode())


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())
