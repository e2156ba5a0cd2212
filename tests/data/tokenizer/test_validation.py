"""A hostile tokenizer.json is one error before it is loaded; published ones are loaded, most of them at once."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qlora_jax.data.tokenizer import validation
from qlora_jax.data.tokenizer.gguf_tokenizer import KNOWN_PRE
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.data.tokenizer.validation import check_tokenizer, table_of, table_problems
from tests.data.tokenizer.hostile_tokenizers import PUBLISHED, REFUSED, TABLE, TRIED, Parts, precompiled, split
from tests.marks import first_always

PATH = Path("model/tokenizer.json")
WORDS = tokenizers.models.BPE({letter: number for number, letter in enumerate("ab c\u00e4x1")}, [])


def json_of(parts: Parts, **model: Any) -> dict[str, Any]:
    whole = json.loads(tokenizers.Tokenizer(WORDS).to_str())
    return {**whole, **parts, "model": {**whole["model"], **model}}


def check(whole: dict[str, Any]) -> None:
    parts = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    check_tokenizer(json.dumps(whole), parts, whole["model"], PATH)


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_parts_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(validation, "_try", pytest.fail)
    parts, problem = REFUSED[name]
    with pytest.raises(ValueError, match=rf"(?s)^model/tokenizer\.json: unsafe\..*{problem}"):
        check(json_of(parts))


@pytest.mark.parametrize("name", first_always(list(TRIED)))
def test_patterns_that_backtrack_are_found_by_trial(name: str):
    parts, problem = TRIED[name]
    with pytest.raises(ValueError, match=rf"(?s)^model/tokenizer\.json: unsafe\..*{problem}"):
        check(json_of(parts))


def test_every_problem_is_listed():
    with pytest.raises(ValueError) as caught:
        check(json_of(REFUSED["steps"][0], dropout=0.1, end_of_word_suffix="x" * 101, max_input_chars_per_word=2000))
    assert str(caught.value).splitlines()[1:] == [
        "  model.end_of_word_suffix: found 101 characters, expected at most 100",
        "  model.max_input_chars_per_word: found 2000, expected at most 1000",
        "  model.dropout: found 0.1, expected null: it makes the ids of a text random",
        "  normalizer: found 65 steps, expected at most 64",
    ]


def test_patterns_of_known_tokenizers_are_not_tried(monkeypatch: pytest.MonkeyPatch, smollm2_source: dict):
    monkeypatch.setattr(validation, "_try", pytest.fail)
    check(json.loads(smollm2_source["tokenizer_json"]))
    for pre in KNOWN_PRE.values():
        tokenizer = tokenizers.Tokenizer(WORDS)
        tokenizer.pre_tokenizer = pre.split()
        check(json.loads(tokenizer.to_str()))


def test_published_patterns_and_tables_are_accepted_by_trial(monkeypatch: pytest.MonkeyPatch):
    tried = []
    monkeypatch.setattr(
        validation, "_try", lambda *given, run=validation._try: tried.append(found := run(*given)) or found
    )
    check(json_of({"pre_tokenizer": split(*PUBLISHED), "normalizer": precompiled(TABLE)}))
    assert tried == [[]]


TEXTS = ("a", "ab", "abc", "\u00a0", "\ufdfa", "x\u00a0\u00a1", "\ufdf9\ufdfb", "\x00", "\U0001f642\xff")


def normalized(table: bytes) -> list[str]:
    loaded = tokenizers.Tokenizer.from_str(json.dumps(json_of({"normalizer": precompiled(table)})))
    return [loaded.normalizer.normalize_str(text) for text in TEXTS]


def test_a_table_without_problems_makes_the_library_neither_panic_nor_write_much():
    assert normalized(TABLE)[:4] == ["\u00e4", "\u00e4b", "\u00e4bc", " "]
    found = 0
    for number in range(400):
        chance, table = random.Random(number), bytearray(TABLE)
        for _ in range(chance.choice((1, 1, 4))):
            table[chance.choice((chance.randrange(len(table)), len(table) - chance.randrange(1, 40)))] ^= (
                1 << number % 8
            )
        if table_problems(*table_of(precompiled(bytes(table)))):
            found += 1
        else:
            assert max(map(len, normalized(bytes(table)))) <= 5 * validation.MAX_TEXT
    assert 50 < found < 350


def test_a_trie_that_refers_outside_of_itself_is_found_before_the_library_panics():
    table = bytearray(TABLE)
    table[4:8] = (0x1FFFFF << 10).to_bytes(4, "little")  # the offset of the first unit, where no key ends
    assert table_problems(*table_of(precompiled(bytes(table)))) == ["its trie refers to a unit outside of it"]
    with pytest.raises(BaseException, match="index out of bounds"):
        normalized(bytes(table))


def test_a_panic_is_one_error_with_the_name_of_the_file(capfd: pytest.CaptureFixture[str]):
    hostile = json.dumps(json_of({"pre_tokenizer": split("(a+)+$")}))
    tokenizer = load_tokenizer({"tokenizer_json": hostile, "tokenizer_name": str(PATH)})
    for encode in (tokenizer.encode_spans, lambda texts: tokenizer.encode(texts[0])):
        with pytest.raises(ValueError, match=r"^model/tokenizer\.json: the tokenizers library fails .*retry-limit"):
            encode(["a" * 40 + "b"])
    assert capfd.readouterr().out == ""
