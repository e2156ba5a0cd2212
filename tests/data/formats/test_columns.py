"""Names of a file's columns: rows are renamed, and the setting that an error suggests works."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_jax.config import ROW_COLUMNS
from qlora_jax.config.row_formats import ROW_FORMATS
from qlora_jax.config.yaml_files import one_line_yaml, parse_yaml
from qlora_jax.data.formats.columns import columns_setting, likely_column, rename_columns
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.formats.turn_fields import TEMPLATE_KWARGS
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loading import load, question

NAMES = {"prompt": "question", "completion": "answer"}


def asked(number: int) -> dict[str, Any]:
    return {"question": f"Is {number} odd?", "answer": "yes", "id": number}


def test_settings_know_the_formats_and_their_columns():
    assert ROW_FORMATS.names() == ("auto", *FORMATS)
    of_formats = {name for form in FORMATS.values() for name in (*form.required, *form.optional)}
    assert set(ROW_COLUMNS) == {*of_formats, TEMPLATE_KWARGS}
    documented = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f" {name} |" not in documented and f" {name}, " not in documented] == []


@pytest.mark.parametrize("cached", [False, True])
def test_rows_under_other_names_give_the_same_batches(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Any, cached: bool
):
    cache = {"cache": str(tmp_path / "cache")} if cached else {}
    plain = load(tokenizer, train=write_rows([question(n) for n in range(10)]), **cache)
    other = write_rows([asked(n) for n in range(10)], "other.jsonl")
    for _ in range(2):  # the second time from the cache
        renamed = load(tokenizer, train=other, columns=NAMES, **cache)
        assert renamed.fingerprint == plain.fingerprint
        assert renamed.report.train.ignored_columns == ("id",)
    swapped = load(tokenizer, train=other, columns={"prompt": "answer", "completion": "question"}, **cache)
    assert swapped.fingerprint != plain.fingerprint


def test_files_of_a_mixture_have_their_own_names(tokenizer: Tokenizer, write_rows: Callable):
    a, b = write_rows([question(1)], "a.jsonl"), write_rows([asked(2)], "b.jsonl")
    held = write_rows([asked(3)], "held.jsonl")
    dataset = load(tokenizer, train={a: 1.0, b: 1.0}, eval=held, columns={b: NAMES, held: NAMES})
    assert (dataset.report.train.kept, dataset.report.train.form) == (2, "completion")
    assert dataset.eval is not None and len(dataset.eval) == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:1: data\.columns: no column 'question' or 'answer'"):
        load(tokenizer, train={a: 1.0, b: 1.0}, columns=NAMES)


def test_a_column_under_our_name_gives_way_to_the_named_one():
    row = {"prompt": "number 7", "question": "Q", "answer": "A", "id": 1}
    assert rename_columns(row, NAMES, "data.columns") == {"id": 1, "prompt": "Q", "completion": "A"}
    assert rename_columns(row, {"input": "ctx", "prompt": "id"}, "data.columns", {"input"}) == {
        "question": "Q",
        "answer": "A",
        "prompt": 1,
    }


def test_optional_columns_may_be_absent_from_a_row_but_not_from_all(tokenizer: Tokenizer, write_rows: Callable):
    rows = [{"task": "Add", "ctx": "1 and 2", "output": "3"}, {"task": "Go", "output": "gone"}]
    names = {"instruction": "task", "input": "ctx"}
    dataset = load(tokenizer, train=write_rows(rows), columns=names)
    texts = [tokenizer.decode(dataset.train.row(n)[0].tolist()) for n in (0, 1)]
    assert "Add\n\n1 and 2" in texts[0] and "Go<|im_end|>" in texts[1]
    with pytest.raises(ValueError, match=r"data\.columns: no column 'ctxt' .*did you mean 'ctx'\?\) in any"):
        load(tokenizer, train=write_rows([{**rows[0], "ctx": "x"}]), columns={**names, "input": "ctxt"})


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"prompt": "Question", "completion": "answer"}, r"no column 'Question' .*; did you mean 'question'\?"),
        ({"prompt": "quesion", "completion": "answr"}, r"no column 'quesion' or 'answr' .*mean 'question', 'answer'\?"),
        (
            {"prompt": "xyz", "completion": "answer"},
            r"no column 'xyz' \(found 'question', 'answer', 'id'\)\nCorrect the rows\.$",
        ),
    ],
)
def test_a_missing_column_is_reported_with_the_nearest(
    tokenizer: Tokenizer, write_rows: Callable, names: dict[str, str], problem: str
):
    with pytest.raises(ValueError, match=rf"2 of 2 rows can't be used:\n  .*:1, 2: data\.columns: {problem}"):
        load(tokenizer, train=write_rows([asked(1), asked(2)]), columns=names)


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (("question", "answer"), NAMES),
        (("Question Text", "Answer Text"), {"prompt": "Question Text", "completion": "Answer Text"}),
        (("Prompt ", " COMPLETION"), {"prompt": "Prompt ", "completion": " COMPLETION"}),
        (("user_question", "model-answer"), {"prompt": "user_question", "completion": "model-answer"}),
        (("it's a question", "Answer: x, y"), {"prompt": "it's a question", "completion": "Answer: x, y"}),
    ],
)
def test_the_suggested_setting_works(
    tokenizer: Tokenizer, write_rows: Callable, columns: tuple[str, str], names: dict[str, str]
):
    path = write_rows([dict(zip(columns, ("Is 7 odd?", "yes"), strict=True))])
    with pytest.raises(ValueError, match=r"Nearest: completion\. Set --data\.columns") as error:
        load(tokenizer, train=path)
    found = re.search(r"Set (--data\.columns .*)\.$", str(error.value))
    assert found
    option, mapping = shlex.split(found[1])
    assert (option, parse_yaml(mapping)) == ("--data.columns", names)
    assert load(tokenizer, train=path, columns=names).report.train.kept == 1


def test_a_suggestion_keeps_the_names_that_are_given(tokenizer: Tokenizer, write_rows: Callable):
    with pytest.raises(ValueError, match=r"Set --data\.columns '\{prompt: question, completion: answer\}'\.$"):
        load(tokenizer, train=write_rows([asked(1)]), columns={"prompt": "question"})


@given(st.dictionaries(st.sampled_from(ROW_COLUMNS), st.text(min_size=1), min_size=1))
@example({"messages": "\n"})
def test_a_suggested_setting_is_read_back(names: dict[str, str]):
    option, mapping = shlex.split(columns_setting("data.columns", names))
    assert option == "--data.columns" and parse_yaml(mapping) == names and "\n" not in one_line_yaml(names)


def test_names_with_spaces_at_their_ends_are_quoted_once():
    assert columns_setting("data.columns", {"prompt": "Prompt ", "text": "é"}) == (
        """--data.columns '{"prompt": "Prompt ", "text": "é"}'"""
    )


def test_words_that_say_nothing_suggest_nothing():
    assert likely_column("text", ["Question Text"]) is None
    assert likely_column("text", ["Text"]) == "Text"
