"""Builds a tokenizer from GGUF metadata.

Byte-level BPE equals the tokenizer.json that the file was made from. SentencePiece's BPE equals SentencePiece.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type
Metadata = Mapping[str, Any]  # values of tokenizer.ggml.*: text, flags, and lists of texts or numbers
SPACE = "\u2581"  # SentencePiece writes a space as this character


class Pre(NamedTuple):
    """The pre-tokenization that a value of `tokenizer.ggml.pre` names: all of a tokenizer but vocabulary and merges."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"


def _by_case(ending: str) -> str:
    """Returns a pattern of words that splits a word where a capital follows a small letter."""
    start, small, large = r"[^\r\n\p{L}\p{N}]?", r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
    return f"{start}[{large}]*[{small}]+{ending}|{start}[{large}]+[{small}]*{ending}"


def _split(number: str, words: str = _WORDS, after: str | None = r"\r\n") -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Returns a split by words, numbers, runs of other characters (followed by any of `after`), and spaces."""
    others = rf" ?[^\s\p{{L}}\p{{N}}]+[{after}]*" if after else r" ?[^\s\p{L}\p{N}\r\n]+"
    pattern = rf"{words}|{number}|{others}|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split
    return lambda: pre_tokenizers.Sequence([split(Regex(pattern), "isolated"), _byte_level(use_regex=False)])


# Only names that tests compare with their published tokenizers, with transformers, or with llama.cpp. A guess would
# give wrong ids without an error.
_LLAMA3 = Pre(_split(r"\p{N}{1,3}"), ignore_merges=True)
_DBRX = Pre(_split(r"\p{N}{1,3}"))

KNOWN_PRE = {
    "smollm": Pre(_digits_then_bytes),
    "gpt-2": Pre(_byte_level),
    "phi-2": Pre(_byte_level),
    # OLMo uses that of GPT-NeoX.
    "olmo": Pre(_byte_level, normalizer=normalizers.NFC),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "dbrx": _DBRX,
    "gpt-4o": Pre(_split(r"\p{N}{1,3}", _by_case(_ENDINGS + "?"), r"\r\n/")),
    "tekken": Pre(_split(r"\p{N}", _by_case(""), r"\r\n/"), ignore_merges=True),
    "qwen2": Pre(_split(r"\p{N}"), normalizer=normalizers.NFC),
    # CohereTokenizer of transformers.
    "command-r": Pre(_digits_then_bytes, normalizer=normalizers.NFC),
    # The patterns of llama.cpp (llama-vocab.cpp): refact (StarCoder's, of Granite) has smollm's, exaone4 has gpt-2's,
    # and chatglm4, for which glm4 is another name, has dbrx's. Seed's keeps line ends apart from other characters.
    "refact": Pre(_digits_then_bytes),
    "exaone4": Pre(_byte_level),
    "glm4": _DBRX,
    "chatglm-bpe": _DBRX,
    "seed-coder": Pre(_split(r"\p{N}", after=None)),
}


def known_pre_of(tokenizer: Tokenizer, ignore_merges: bool, texts: Sequence[str]) -> str | None:
    """Returns the value of `tokenizer.ggml.pre` that normalizes and splits `texts` as `tokenizer` does, or None."""
    pieces = [_pieces(tokenizer.normalizer, tokenizer.pre_tokenizer, text) for text in texts]
    for name, pre in KNOWN_PRE.items():
        steps = pre.normalizer() if pre.normalizer else None, pre.split()
        if pre.ignore_merges == ignore_merges and pieces == [_pieces(*steps, text) for text in texts]:
            return name
    return None


def _pieces(
    normalizer: normalizers.Normalizer | None, split: pre_tokenizers.PreTokenizer | None, text: str
) -> list[str]:
    normal = normalizer.normalize_str(text) if normalizer else text
    return [piece for piece, _ in split.pre_tokenize_str(normal)] if split else [normal]


def tokenizer_from_gguf(metadata: Metadata, bos: str | None = None) -> Tokenizer:
    """Builds the tokenizer that `tokenizer.ggml.*` describes.

    Args:
      metadata: `model` (a key of MODELS), `tokens` and `token_type`. "gpt2" also needs `pre` (a key of KNOWN_PRE) and
        `merges` ("a b"). "llama" also needs `scores` (if empty, tokens merge in their order) and `add_space_prefix`.
      bos: token that tokenizer.json puts before every text, or None.

    Raises:
      ValueError: an unknown model or `pre`, lists of different lengths, repeated tokens, a malformed merge, or a
        `bos` that is not in the vocabulary.
    """
    if metadata.get("model") not in MODELS:
        raise ValueError(
            f"GGUF: tokenizer.ggml.model is not supported (found {metadata.get('model')!r}, expected "
            f"{' or '.join(map(repr, MODELS))}). Use the model's Hugging Face folder, which contains tokenizer.json."
        )
    metadata = {**metadata, "tokens": _spelt_as_in_tokenizer_json(metadata)}
    tokenizer = MODELS[metadata["model"]](metadata)
    # Tokens that are in the vocabulary already get the ids that they have there.
    tokenizer.add_tokens(_added_tokens(metadata["tokens"], metadata["token_type"]))
    _check_size(tokenizer, metadata["tokens"])
    if bos is not None:
        tokenizer.post_processor = _starting_with(bos, tokenizer.token_to_id(bos))
    return tokenizer


def _starting_with(bos: str, bos_id: int | None) -> processors.TemplateProcessing:
    if bos_id is None:
        raise ValueError(
            f"GGUF: tokenizer.ggml.bos_token_id: its token is not in the rebuilt vocabulary (found {bos!r}). Use the "
            "model's Hugging Face folder, which contains tokenizer.json."
        )
    starts = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
    return processors.TemplateProcessing(**starts, special_tokens=[(bos, bos_id)])


def _byte_level_bpe(metadata: Metadata) -> Tokenizer:
    pre = metadata.get("pre")
    if pre not in KNOWN_PRE:
        raise ValueError(
            f"GGUF: tokenizer.ggml.pre is unknown (found {pre!r}, expected one of {', '.join(KNOWN_PRE)}), so "
            "the split before BPE would be a guess. Use the model's Hugging Face folder, which contains tokenizer.json."
        )
    pre = KNOWN_PRE[pre]
    vocabulary, merges = _vocabulary(metadata["tokens"]), _merges(metadata["merges"])
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises a bare Exception for a merge of tokens that are absent
        raise ValueError(f"GGUF: tokenizer.ggml.merges: {error}. Use an undamaged file.") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = pre.normalizer() if pre.normalizer else None
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Metadata) -> Tokenizer:
    """Builds BPE over whole texts with SPACE for spaces. Characters that no piece covers become bytes."""
    counts = {name: len(metadata[name]) for name in ("tokens", "token_type", "scores")}
    if not counts["scores"]:  # Gemma's order of merges follows from that of its tokens
        del counts["scores"]
    if len(set(counts.values())) > 1:
        raise ValueError(f"GGUF: tokenizer.ggml lists have different lengths: {counts}. Use an undamaged file.")
    tokens, kinds = metadata["tokens"], metadata["token_type"]
    merges = _merges_of_pieces(tokens, kinds, metadata["scores"])
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    bpe = models.BPE(_vocabulary(tokens), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prefixed, replaced = metadata["add_space_prefix"], normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced]) if prefixed else replaced
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefixed else []))
    return tokenizer


MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


def _spelt_as_in_tokenizer_json(metadata: Metadata) -> Sequence[str]:
    """Returns the tokens, with SPACE in runs of spaces if the vocabulary is ordered by merges, as Gemma's are.

    Gemma's tokenizer.json makes a run of spaces by merging SPACE. GGUF files spell these tokens with spaces.
    In other vocabularies, tokens of spaces are found in a text as they are spelt.
    """
    tokens = metadata["tokens"]
    if metadata["model"] != "llama" or metadata["scores"]:
        return tokens
    return [SPACE * len(token) if token and set(token) == {" "} else token for token in tokens]


def _check_size(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Raises ValueError if the tokenizer has other tokens than the file, whose ids would be beyond the embedding."""
    if (size := tokenizer.get_vocab_size(with_added_tokens=True)) != len(tokens):
        extra = [text for text, number in tokenizer.get_vocab(with_added_tokens=True).items() if number >= len(tokens)]
        raise ValueError(
            f"GGUF: the tokenizer cannot be rebuilt from tokenizer.ggml (found {size} tokens, expected {len(tokens)}; "
            f"not in the file: {sorted(extra)[:5]}). Use the model's Hugging Face folder, with tokenizer.json."
        )


def _merges_of_pieces(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns every pair of pieces that joins to a piece, highest score first: SentencePiece's merge order.

    Without scores, pieces that come first in the vocabulary merge first.
    """
    pieces = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == NORMAL or set(token) == {SPACE}
    }
    rank = {token: -scores[index] if scores else index for token, index in pieces.items()}
    pairs = [
        (token[:cut], token[cut:])
        for token in pieces
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    return sorted(pairs, key=lambda pair: (rank[pair[0] + pair[1]], pieces[pair[0]], pieces[pair[1]]))


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = [token for index, token in enumerate(tokens) if vocabulary[token] != index]
        raise ValueError(
            f"GGUF: tokenizer.ggml.tokens repeats {len(twice)} tokens, such as {twice[:5]}. Use an undamaged file."
        )
    return vocabulary


def _merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ") for merge in merges]
    wrong = [f"{index}: {merges[index]!r}" for index, pair in enumerate(pairs) if len(pair) != 2]
    if wrong:
        raise ValueError(f"GGUF: {len(wrong)} of tokenizer.ggml.merges are not two tokens: {', '.join(wrong[:5])}")
    return [(first, second) for first, second in pairs]


def _added_tokens(tokens: Sequence[str], token_type: Sequence[int]) -> list[AddedToken]:
    """Returns the tokens that are found in a text before BPE splits it; all but user-defined ones are special."""
    if len(tokens) != len(token_type):
        raise ValueError(
            f"GGUF: tokenizer.ggml.token_type has the wrong length (found {len(token_type)}, expected {len(tokens)}). "
            "Use an undamaged file."
        )
    return [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, token_type, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
