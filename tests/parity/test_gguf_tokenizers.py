"""Tokenizers rebuilt from GGUF files give llama.cpp's ids of hard texts; where it differs, those of tokenizer.json."""

import functools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from qlora_jax.data.tokenizer.gguf_tokenizer import KNOWN_PRE, SPACE, tokenizer_from_gguf
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.tokenizer_metadata import PREFIX, tokenizer_from_metadata, tokenizer_metadata
from qlora_jax.io.gguf.writer import GgufSpec, typed_keys, write_gguf
from tests.data.tokenizer.hard_texts import hard_texts
from tests.io.tiny_tokenizers import LINES, SPECIAL, sentencepiece_metadata
from tests.marks import EXHAUSTIVE, SLOW

SCRIPT = Path(__file__).parent.parent / "oracle/llama_cpp_ids.py"
IN_CI, ALL = 250, 2000  # texts
# Those of which another has another name, or whose patterns are near another's, are left to a release.
KINDS_IN_CI = ["smollm", "gpt-2", "llama-bpe", "tekken", "qwen2", "seed-coder", "llama", "gemma3"]
OWN = ["<tool>", "    ", "\t\t"]  # user-defined tokens
SENTENCEPIECE = {"llama": "llama", "bare": "llama", "gemma3": "gemma3"}  # by name: the file's architecture


def _byte_level(pre: str) -> str:
    """Returns tokenizer.json of a small vocabulary with the way of splitting that `pre` names."""
    parts = KNOWN_PRE[pre]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=parts.ignore_merges))
    tokenizer.normalizer = parts.normalizer() if parts.normalizer else None
    tokenizer.pre_tokenizer = parts.split()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in OWN])
    return tokenizer.to_str()


def _sentencepiece(name: str) -> str:
    """Returns tokenizer.json of a small SentencePiece vocabulary."""
    runs = [SPACE * count for count in range(2, 32)] if name == "gemma3" else []
    own = [*LINES, *runs, "<table>", "\t", "\t\t"] if name != "llama" else []
    return tokenizer_from_gguf(sentencepiece_metadata(1200, name == "llama", own, _training_texts())).to_str()


@functools.cache
def _training_texts() -> list[str]:
    # No file of llama.cpp's can hold a token with NUL.
    return [text.replace("\0", "") for _, text in hard_texts(300, seed=1)]


def _vocabulary_file(path: Path, text: str, architecture: str, pre: str) -> Path:
    """Writes a GGUF file without tensors with the vocabulary of a tokenizer.json."""
    tokenizer = load_tokenizer({"tokenizer_json": text})
    metadata, _ = tokenizer_metadata(tokenizer, tokenizer.vocab_size, [], architecture)
    keys = typed_keys({**metadata, f"{PREFIX}pre": pre})
    write_gguf(path, GgufSpec(architecture, keys, {}, {}), [], iter(()), "float32")
    return path


def _read(path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_from_metadata(path, parse_header(path).metadata))


def _cases(folder: Path, names: list[str]) -> dict[str, tuple[Path, Tokenizer]]:
    """{name: (GGUF file, the tokenizer.json that it was made from)}."""
    found = {}
    for name in names:
        architecture = SENTENCEPIECE.get(name, "llama")
        text = _sentencepiece(name) if name in SENTENCEPIECE else _byte_level(name)
        pre = "default" if name in SENTENCEPIECE else name
        file = _vocabulary_file(folder / f"{name}.gguf", text, architecture, pre)
        found[name] = file, load_tokenizer({"tokenizer_json": text})
    return found


def _is_decomposed(text: str) -> bool:
    return not unicodedata.is_normalized("NFC", text)


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


# Texts whose ids in llama.cpp are not those of tokenizer.json. docs/families.md lists the same.
LLAMA_CPP_DIFFERS: dict[str, Callable[[str], bool]] = {
    "olmo": _is_decomposed,  # it does not compose characters
    "qwen2": _is_decomposed,
    "command-r": _is_decomposed,
    "gpt-4o": _has_marks,  # its pattern of words has no marks
    "tekken": _has_marks,
    # It takes the longest run first, and finds no SPACE that stands in the text itself.
    "gemma3": lambda text: " " * 32 in text or (SPACE * 2 in text.replace(" ", SPACE) and SPACE in text),
}


@pytest.mark.parametrize(
    ("count", "kinds"),
    [
        pytest.param(IN_CI, KINDS_IN_CI, marks=SLOW),
        pytest.param(ALL, [*KNOWN_PRE, *SENTENCEPIECE], marks=EXHAUSTIVE),
    ],
    ids=["sample", "all"],
)
def test_every_kind_of_vocabulary(tmp_path: Path, llama_cpp: Callable, count: int, kinds: list[str]) -> None:
    """Writes the vocabulary of a tokenizer.json to a file, which both read."""
    texts = [text for _, text in hard_texts(count)]
    cases = _cases(tmp_path, kinds)
    theirs = llama_cpp(SCRIPT, cases={name: {"file": str(file), "texts": texts} for name, (file, _) in cases.items()})
    for name, (file, published) in cases.items():
        ours, expected = _read(file).encode_batch(texts), json.loads(str(theirs[name]))
        assert ours == published.encode_batch(texts), name
        differ = [text for text, a, b in zip(texts, ours, expected, strict=True) if a != b]
        known = LLAMA_CPP_DIFFERS.get(name, lambda text: False)
        assert [text for text in differ if not known(text)] == [], name
        assert bool(differ) == (name in LLAMA_CPP_DIFFERS), name


@pytest.mark.exhaustive
@pytest.mark.slow
def test_smollm2(smollm2_gguf: Path, llama_cpp: Callable) -> None:
    """A real file. Its vocabulary lacks some bytes; neighbours of a dropped byte merge here, as in tokenizer.json."""
    tokenizer, texts = _read(smollm2_gguf), [text for _, text in hard_texts(ALL)]
    found = llama_cpp(SCRIPT, cases={"it": {"file": str(smollm2_gguf), "texts": texts}})
    ours, theirs = tokenizer.encode_batch(texts), json.loads(str(found["it"]))
    differ = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not any(map(tokenizer.round_trips, differ)), differ


@pytest.mark.exhaustive
@pytest.mark.slow
def test_gemma3(gemma3_gguf: Path, llama_cpp: Callable) -> None:
    """A real file with user-defined tokens of spaces."""
    texts = [text for _, text in hard_texts(ALL)]
    found = llama_cpp(SCRIPT, cases={"it": {"file": str(gemma3_gguf), "texts": texts}})
    tokenizer, theirs = _read(gemma3_gguf), json.loads(str(found["it"]))
    assert tokenizer.vocab_size == 262_144
    differ = [text for text, a, b in zip(texts, tokenizer.encode_batch(texts), theirs, strict=True) if a != b]
    assert all(map(LLAMA_CPP_DIFFERS["gemma3"], differ))
