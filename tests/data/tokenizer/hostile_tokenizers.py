"""Parts of tokenizer.json, hostile and sound, and a table of SentencePiece's normalization."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

Parts = Mapping[str, Any]


def replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(*patterns: str) -> dict[str, Any]:
    """Returns a pre-tokenizer that splits by regular expressions."""
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return {"type": "Sequence", "pretokenizers": splits}


def sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(texts: Mapping[str, str]) -> bytes:
    """Returns a table that writes some texts as others; each node of its trie has a block of 256 units."""
    units, written = np.zeros(256, np.uint32), b""
    bases = {b"": 0}  # a key's beginning -> its unit, from which those of its next bytes are reached by xor
    for text, other in texts.items():
        key = text.encode()
        for end in range(1, len(key) + 1):
            place = bases[key[: end - 1]] ^ key[end - 1]
            if key[:end] not in bases:
                block = len(units) >> 8
                units = np.concatenate([units, np.zeros(256, np.uint32)])
                units[place] = (block ^ place >> 8) << 10 | 1 << 9 | key[end - 1]
                bases[key[:end]] = block << 8 | place & 255
        units[place] |= 1 << 8
        units[bases[key]] = 1 << 31 | len(written)
        written += other.encode() + b"\0"
    return units.nbytes.to_bytes(4, "little") + units.astype("<u4").tobytes() + written


def precompiled(table: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


TABLE = charsmap({"\u00a0": " ", "\ufdfa": "\u0635\u0644\u0649 \u0627\u0644\u0644\u0647", "a": "\u00e4"})
TENFOLD = replace({"String": "a"}, "a" * 10)
# Parts -> the problem.
REFUSED: dict[str, tuple[Parts, str]] = {
    "tenfold": ({"normalizer": sequence(*[TENFOLD] * 10)}, r"normalizer: may make a text 1e\+10 times as long"),
    "inserted twice": (
        {"decoder": {"type": "Sequence", "decoders": [replace({"Regex": ""}, "b" * 90)] * 2}},
        "decoder: may",
    ),
    "prefix": ({"normalizer": {"type": "Prepend", "prepend": "b" * 101}}, "prepend: found 101 characters, expected at"),
    "steps": ({"normalizer": sequence(*[{"type": "Strip"}] * 64)}, "normalizer: found 65 steps, expected at most 64"),
    "disguised": ({"normalizer": {**replace({"String": "a"}, "b" * 100), "normalizers": [TENFOLD]}}, "1e\\+03 times"),
    "no type": ({"normalizer": {"pattern": {"Regex": "a"}, "content": "b"}}, "normalizer: a step without a type"),
    "long pattern": ({"pre_tokenizer": split("a" * 2001)}, "pre_tokenizer: a pattern is too long"),
    "no table": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}},
        "a trie of 0 bytes",
    ),
    "large trie": ({"normalizer": precompiled(b"\xff" * 8)}, r"a trie of 4,294,967,295 bytes \(found 4\)"),
    "long text": ({"normalizer": precompiled(charsmap({"a": "b" * 101}))}, "it writes a text of 101 bytes"),
}
# Parts whose time shows only when a text is encoded -> the problem.
TRIED: dict[str, tuple[Parts, str]] = {
    "exponential": ({"pre_tokenizer": split("(a+)+$")}, "the tokenizers library fails: .*retry-limit-in-match over"),
    "exponential replacement": ({"normalizer": replace({"Regex": "(a+)+$"}, "b")}, "retry-limit-in-match over"),
    "cubic": ({"pre_tokenizer": split("a*a*b|.")}, "takes more than 1 s of processor time for 2,000 characters"),
    "words": ({"pre_tokenizer": split("(ab|ab){20}c|.")}, "takes more than 1 s of processor time for 2,000 characters"),
}
# Patterns of published tokenizers (DeepSeek-V3, Kimi-K2), which are tried, and accepted.
PUBLISHED = (
    "\\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+"
    "[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    "[\\p{Han}]+|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]*"
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\s+(?!\\S)|\\s+",
)
