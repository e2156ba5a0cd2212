"""Small tokenizers of the kinds in GGUF files, trained on a given text, as the text of tokenizer.json."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora_jax.data.tokenizer.from_gguf import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, rebuild

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog; 1234567 times, it's said.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Stra\u00dfe und Gr\u00f6\u00dfe, na\u00efve caf\u00e9s; \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
] * 4


def byte_level(split: str = "smollm", size: int = 384, normalizer: str | None = None) -> str:
    """Byte-level BPE: "smollm" splits off digits, "gpt-2" does not, "dots" splits at every dot, as no model does."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
        "dots": [pre_tokenizers.Split(Regex(r"\."), "removed")],
    }[split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(vocab_size=size - 3 - 256 - 2, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([f" {word}" for text in CORPUS for word in text.split(" ")], trainer)
    trained = tokenizer.get_vocab()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(trained, key=trained.get)]
    own = ["\n\n", "<table>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(trained), *[USER_DEFINED] * len(own)]
    # As in SentencePiece, every pair that forms a piece merges, earlier pieces first.
    metadata = {
        "model": "llama",
        "tokens": tokens + own,
        "token_type": kinds,
        "scores": [],
        "add_space_prefix": prefixed,
    }
    return rebuild(metadata).to_str()
