"""Tokenizers from GGUF metadata against tokenizer.json, the real GGUF, transformers and SentencePiece."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.data.tokenizer.gguf_tokenizer import KNOWN_PRE, SPACE, tokenizer_from_gguf
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.tokenizer.hard_texts import hard_texts
from tests.io.tiny_tokenizers import sentencepiece_metadata

ROOT = Path(__file__).parents[3]


TRICKY = (
    "\n    5",
    "  12  345",
    "x =  1_000\t\t7\r\n\r\n",
    "१२३ ٤٥٦ \uff14\uff15 ½ ²",
    "Straße, naïve café, ﬁ ligature, e\u0301",
    "Привет, мир! 42 раза",
    "中文字符\uff0c测试123。日本語テスト한국어",
    "שלום עולם العربية ١٢٣ हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ok👍🏽5",
    "\x00\x01\x1b[31m\x7f\x85\u200b\ufeff\u2028",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_end",
    "<repo_name>a<file_sep> <empty_output>",
    "I'll can't WE'RE they'd 'S 's",
    "a" * 300 + " " * 70 + "\n" * 40,
)


def _strings(count: int) -> list[str]:
    """Strings of code, prose, and random mixtures of scripts, digits, spaces and special tokens."""
    generator = random.Random(0)
    code = "\n".join(path.read_text() for path in sorted((ROOT / "qlora_jax").rglob("*.py")))
    prose = (ROOT / "examples/titles/heldout.jsonl").read_text(encoding="utf-8")
    scripts = [
        "abc XYZ",
        "0123456789",
        " \t\n\r",
        "éüßñ",
        "Привет",
        "中文字",
        "ひらカナ",
        "한국",
        "עברית",
        "عرب١٢",
        "हिन्दी",
        "ไทย",
    ]
    pieces = [*scripts, "👍🏽😀👩‍👧", "\x00\x1b\x7f\u200b", "'sll'RE", "<|im_end|>", "<|im_start|>", "()[]{}:;_-"]

    def mixed() -> str:
        chosen = generator.choices(pieces, k=generator.randint(1, 12))
        return "".join(
            p if p.startswith("<|") else "".join(generator.choices(p, k=generator.randint(1, 5))) for p in chosen
        )

    def cut(text: str) -> str:
        start = generator.randrange(len(text) - 200)
        return text[start : start + generator.randint(1, 200)]

    third = count // 3
    return [
        *TRICKY,
        *(mixed() for _ in range(third)),
        *(cut(code) for _ in range(third)),
        *(cut(prose) for _ in range(third)),
    ]


def _difference(ours: list[list[int]], theirs: list[list[int]], strings: list[str]) -> list[str]:
    return [text for text, a, b in zip(strings, ours, theirs, strict=True) if a != b]


def test_metadata_gives_tokenizer_json_back(tokenizer: Tokenizer, smollm2_source: dict, smollm2_metadata: dict):
    source = {key: value for key, value in smollm2_source.items() if key != "tokenizer_json"}
    rebuilt = load_tokenizer({**source, "gguf": smollm2_metadata})
    assert json.loads(rebuilt.to_json()) == json.loads(tokenizer.to_json())
    strings = _strings(6000)
    assert _difference(rebuilt.encode_batch(strings), tokenizer.encode_batch(strings), strings) == []
    assert (rebuilt.bos_id, rebuilt.eos_id, rebuilt.pad_id, rebuilt.unk_id, rebuilt.vocab_size) == (1, 2, 2, 0, 49152)


def test_real_gguf_gives_tokenizer_json_back(smollm2_gguf: Path, tokenizer: Tokenizer, smollm2_template: str):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm2_gguf).fields
    names = ("model", "pre", "tokens", "token_type", "merges")
    metadata = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in names}
    assert json.loads(tokenizer_from_gguf(metadata).to_str()) == json.loads(tokenizer.to_json())
    assert fields["tokenizer.chat_template"].contents() == smollm2_template


def test_gpt2_metadata_gives_gpt2s_tokenizer_back(local_data: Callable[[str], Path]):
    text = local_data("gpt2_tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(text)["model"]["vocab"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": sorted(vocabulary, key=vocabulary.get),
        "token_type": [3 if token == "<|endoftext|>" else 1 for token in sorted(vocabulary, key=vocabulary.get)],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in json.loads(text)["model"]["merges"]],
    }
    ends = {"eos_token": "<|endoftext|>", "add_bos_token": False}
    ours, published = load_tokenizer({"gguf": metadata, **ends}), load_tokenizer({"tokenizer_json": text, **ends})
    strings = [text for text in _strings(3000) if text]
    assert _difference(ours.encode_batch(strings), published.encode_batch(strings), strings) == []
    assert (published.bos_id, published.pad_id, published.eos_id) == (None, None, 50256)


def test_each_kind_splits_as_transformers_does(
    oracle: Callable, tmp_path: Path, smollm2_metadata: dict, smollm2_json: str
):
    """Compares splitting and normalizing. The vocabulary is SmolLM2's, and its special tokens are plain."""
    path, pres = (
        tmp_path / "tokenizer.json",
        ["gpt-2", "phi-2", "olmo", "llama-bpe", "qwen2", "dbrx", "gpt-4o", "tekken", "command-r"],
    )
    path.write_text(smollm2_json, encoding="utf-8")
    texts = [*_strings(600), *(text for _, text in hard_texts(1000))]
    strings = [text for text in texts if "<" not in text]
    theirs = oracle(ROOT / "tests/oracle/tokenizer_pre.py", tokenizer_json=str(path), pres=pres, strings=strings)
    for pre in pres:
        ends = theirs[f"{pre}/lengths"].cumsum()[:-1]
        expected = [part.tolist() for part in np.split(theirs[f"{pre}/ids"], ends)]
        plain = {**smollm2_metadata, "pre": pre, "token_type": [1] * len(smollm2_metadata["tokens"])}
        ours = [encoding.ids for encoding in tokenizer_from_gguf(plain).encode_batch(strings)]
        assert _difference(ours, expected, strings) == [], pre


# By name: how "a12).", two line ends and an e with a separate accent are split.
SPLITS = {
    "refact": ["a", "1", "2", ").", "\n", "\n", "e", "\u0301"],
    "command-r": ["a", "1", "2", ").", "\n", "\n", "\u00e9"],
    "exaone4": ["a", "12", ").", "\n", "\n", "e", "\u0301"],
    "glm4": ["a", "12", ").\n\n", "e", "\u0301"],
    "chatglm-bpe": ["a", "12", ").\n\n", "e", "\u0301"],
    "seed-coder": ["a", "1", "2", ").", "\n\n", "e", "\u0301"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_kinds_differ_in_digits_line_ends_and_composing(pre: str) -> None:
    parts, text = KNOWN_PRE[pre], "a12).\n\ne\u0301"
    text = parts.normalizer().normalize_str(text) if parts.normalizer else text
    assert [text[start:end] for _, (start, end) in parts.split().pre_tokenize_str(text)] == SPLITS[pre]


def test_llama3_kinds_take_whole_words_before_merging():
    """Llama 3's published tokenizer.json says ignore_merges: a word in the vocabulary is one token."""
    metadata = {"model": "gpt2", "tokens": ["a", "b", "c", "ab", "abc"], "token_type": [1] * 5, "merges": ["a b"]}
    assert tokenizer_from_gguf({**metadata, "pre": "llama-bpe"}).encode("abc").ids == [4]
    assert tokenizer_from_gguf({**metadata, "pre": "gpt-2"}).encode("abc").ids == [3, 2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pre": "viking"}, "tokenizer.ggml.pre is unknown .found 'viking', expected one of smollm, gpt-2"),
        ({"pre": None}, "tokenizer.ggml.pre is unknown .found None"),
        ({"model": "t5"}, "tokenizer.ggml.model is not supported .found 't5', expected 'gpt2' or 'llama'"),
        (
            {"model": "llama", "scores": [0.0] * 2},
            "lists have different lengths: {'tokens': 3, 'token_type': 3, 'scores': 2}",
        ),
        (
            {"model": "llama", "scores": [], "token_type": []},
            "lists have different lengths: {'tokens': 3, 'token_type': 0}",
        ),
        ({"merges": ["a b", "a", "a b c"]}, "2 of tokenizer.ggml.merges are not two tokens: 1: 'a', 2: 'a b c'"),
        ({"tokens": ["a", "b", "a"]}, r"repeats 1 tokens, such as \['a'\]"),
        ({"token_type": [1]}, "token_type has the wrong length .found 1, expected 3"),
    ],
)
def test_metadata_that_can_not_be_right_is_refused(change: dict[str, Any], told: str):
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
    with pytest.raises(ValueError, match=told):
        tokenizer_from_gguf({**metadata, **change})


def test_a_first_token_that_is_spelt_in_another_way_is_refused():
    metadata = _gemma_metadata()
    with pytest.raises(ValueError, match=r"bos_token_id: its token is not in the rebuilt vocabulary \(found '  '\)"):
        tokenizer_from_gguf(metadata, bos="  ")


def test_every_known_kind_builds():
    metadata = {"model": "gpt2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
    for pre in KNOWN_PRE:
        assert tokenizer_from_gguf({**metadata, "pre": pre}).encode("ab").ids == [2]


def test_sentencepiece_metadata_gives_sentencepieces_ids(oracle: Callable):
    """Covers a space in front, as in Llama's vocabularies, none, as in Gemma's, and bytes if no piece fits."""
    corpus = [line for path in (ROOT / "docs").glob("*.md") for line in path.read_text(encoding="utf-8").splitlines()]
    # Our code may contain control tokens, which SentencePiece reads as plain text. No model is trained on that.
    left_out = ("\x00", "<unk>", "<s>", "</s>")
    strings = [text for text in _strings(300) if not any(spelled in text for spelled in left_out)] + [
        "a <table> b\n\nc",
        "naïve ☃ 中文",
        "  two",
        "",
    ]
    theirs = oracle(ROOT / "tests/oracle/sentencepiece_bpe.py", corpus=corpus, strings=strings)
    for name in ("prefixed", "bare"):
        metadata, ids, texts = (json.loads(str(theirs[f"{name}/{part}"])) for part in ("metadata", "ids", "texts"))
        rebuilt = tokenizer_from_gguf(metadata)
        ours = [encoding.ids for encoding in rebuilt.encode_batch(strings)]
        assert _difference(ours, ids, strings) == []
        assert [rebuilt.decode(row, skip_special_tokens=False) for row in ids] == texts


def test_runs_of_spaces_in_gemmas_vocabulary_keep_their_ids():
    """Its files spell them with spaces, its tokenizer.json with SPACE; each run is one token of the vocabulary."""
    metadata = _gemma_metadata()
    rebuilt, ids = tokenizer_from_gguf(metadata), {token: index for index, token in enumerate(metadata["tokens"])}
    assert rebuilt.get_vocab_size(with_added_tokens=True) == len(metadata["tokens"])
    for length in range(2, 32):
        text = f"a{' ' * length}b"
        assert rebuilt.encode(text).ids == [ids["a"], ids[" " * length], ids["b"]]
        assert rebuilt.decode(rebuilt.encode(text).ids) == text
    again = tokenizer_from_gguf({**metadata, "tokens": [token.replace(" ", SPACE) for token in metadata["tokens"]]})
    assert again.to_str() == rebuilt.to_str()  # older files spell them so


def test_tokens_of_spaces_in_other_vocabularies_are_found_as_they_are_spelt():
    metadata = _gemma_metadata()
    scores = [-1000.0 if token.isspace() else -float(index) for index, token in enumerate(metadata["tokens"])]
    rebuilt = tokenizer_from_gguf({**metadata, "scores": scores})
    assert rebuilt.encode("a  b").ids == tokenizer_from_gguf(metadata).encode("a  b").ids
    assert rebuilt.get_vocab_size(with_added_tokens=True) == len(metadata["tokens"])


def test_the_unknown_token_is_found_in_a_text():
    """Llama's tokenizer.json and llama.cpp find it too."""
    rebuilt = tokenizer_from_gguf(sentencepiece_metadata(460, False, []))
    assert rebuilt.encode("<unk>").ids == [0]


def _gemma_metadata() -> dict[str, Any]:
    runs = [" " * count for count in range(2, 32)]
    return sentencepiece_metadata(460, False, ["\n", "\n\n", *runs, "<table>"])
