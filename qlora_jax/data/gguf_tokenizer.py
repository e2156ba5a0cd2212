"""A byte-level BPE tokenizer from GGUF metadata, equal to the tokenizer.json that the file was made from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


class Pre(NamedTuple):
    """What a value of `tokenizer.ggml.pre` stands for: everything but vocabulary and merges."""

    split: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False


def _byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def _digits_then_bytes() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(number: str) -> Callable[[], Any]:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    pattern = rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split
    return lambda: pre_tokenizers.Sequence([split(Regex(pattern), "isolated"), _byte_level(use_regex=False)])


# Only kinds that tests hold against their published tokenizers; guessing one would give other ids in silence.
_LLAMA3 = Pre(_split(r"\p{N}{1,3}"), ignore_merges=True)
KNOWN_PRE = {
    "smollm": Pre(_digits_then_bytes),
    "gpt-2": Pre(_byte_level),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": Pre(_split(r"\p{N}"), normalizer=normalizers.NFC),
}


def rebuild(metadata: Mapping[str, Any], bos: str | None = None) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Args:
      metadata: `model` ("gpt2"), `pre` (a key of KNOWN_PRE), `tokens`, `token_type`, `merges` ("a b").
      bos: a token that tokenizer.json would put before every text, if any.

    Raises:
      ValueError: another model or `pre`, lists that disagree, or a malformed merge.
    """
    pre = _known_pre(metadata)
    tokens = metadata["tokens"]
    bpe = models.BPE(_vocabulary(tokens), _merges(metadata["merges"]), ignore_merges=pre.ignore_merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = pre.normalizer() if pre.normalizer else None
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    # add_tokens gives a token that is in the vocabulary its own id there.
    tokenizer.add_tokens(_added_tokens(tokens, metadata["token_type"]))
    if bos is not None:
        starts = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
        tokenizer.post_processor = processors.TemplateProcessing(
            **starts, special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _known_pre(metadata: Mapping[str, Any]) -> Pre:
    model, pre = metadata.get("model"), metadata.get("pre")
    if model != "gpt2":
        raise ValueError(
            f"GGUF: tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) can be rebuilt. "
            "Use the model's Hugging Face folder, which holds tokenizer.json."
        )
    if pre not in KNOWN_PRE:
        raise ValueError(
            f"GGUF: tokenizer.ggml.pre is {pre!r}; known: {', '.join(KNOWN_PRE)}. How text is split before BPE "
            "would be a guess. Use the model's Hugging Face folder, which holds tokenizer.json."
        )
    return KNOWN_PRE[pre]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = [token for index, token in enumerate(tokens) if vocabulary[token] != index]
        raise ValueError(f"GGUF: tokenizer.ggml.tokens holds {len(twice)} tokens twice, such as {twice[:5]}")
    return vocabulary


def _merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ") for merge in merges]
    wrong = [f"{index}: {merges[index]!r}" for index, pair in enumerate(pairs) if len(pair) != 2]
    if wrong:
        raise ValueError(f"GGUF: {len(wrong)} of tokenizer.ggml.merges are not two tokens: {', '.join(wrong[:5])}")
    return [(first, second) for first, second in pairs]


def _added_tokens(tokens: Sequence[str], token_type: Sequence[int]) -> list[AddedToken]:
    """Control tokens (special) and user-defined ones: both are found in text before BPE sees it."""
    if len(tokens) != len(token_type):
        raise ValueError(f"GGUF: {len(tokens)} tokenizer.ggml.tokens but {len(token_type)} token_type")
    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, token_type, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
