"""Small tokenizers of the kinds in GGUF files, trained on a given text, as the text of tokenizer.json."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora_jax.data.tokenizer.gguf_tokenizer import (
    BYTE,
    CONTROL,
    KNOWN_PRE,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    tokenizer_from_gguf,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LINES = ["\n", "\n\n", "\n\n\n"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog; 1234567 times, it's said.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Stra\u00dfe und Gr\u00f6\u00dfe, na\u00efve caf\u00e9s; \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
] * 4


def byte_level(split: str = "smollm", size: int = 384, normalizer: str | None = None) -> str:
    """Byte-level BPE with the splitting of a name in KNOWN_PRE; "dots" splits at every dot, as no model does."""
    known = KNOWN_PRE.get(split)
    tokenizer = Tokenizer(models.BPE(ignore_merges=known is not None and known.ignore_merges))
    dots = [pre_tokenizers.Split(Regex(r"\."), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = known.split() if known else pre_tokenizers.Sequence(dots)
    tokenizer.normalizer = normalizers.NFC() if normalizer == "nfc" else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer.to_str()


def sentencepiece(size: int = 460, prefixed: bool = True) -> str:
    """SentencePiece BPE with byte fallback and visible spaces, like Llama's (prefixed) and Gemma's."""
    return tokenizer_from_gguf(sentencepiece_metadata(size, prefixed, ["\n\n", "<table>"])).to_str()


def gemma(size: int = 600) -> str:
    """SentencePiece BPE in the form of Gemma 3: user-defined runs of SPACE, of newlines and of tabs."""
    runs = [SPACE * count for count in range(2, 32)]
    return tokenizer_from_gguf(sentencepiece_metadata(size, False, [*LINES, *runs, "<table>", "\t", "\t\t"])).to_str()


def sentencepiece_metadata(
    size: int, prefixed: bool, user_defined: list[str], texts: Sequence[str] = CORPUS
) -> dict[str, Any]:
    """GGUF metadata of a vocabulary of `size` tokens, trained on `texts`. Earlier pieces merge first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    control = ["<unk>", "<s>", "</s>"]
    pieces = size - len(control) - 256 - len(user_defined)
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([f" {word}" for text in texts for word in text.split(" ")], trainer)
    trained = tokenizer.get_vocab()
    learned = [piece for piece in sorted(trained, key=trained.get) if piece not in user_defined]
    numbered_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = {
        UNKNOWN: control[:1],
        CONTROL: control[1:],
        USER_DEFINED: user_defined,
        BYTE: numbered_bytes,
        NORMAL: learned,
    }
    return {
        "model": "llama",
        "tokens": [token for tokens in kinds.values() for token in tokens],
        "token_type": [kind for kind, tokens in kinds.items() for _ in tokens],
        "scores": [],
        "add_space_prefix": prefixed,
    }
