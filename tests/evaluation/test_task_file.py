"""Columns of task files may have other names, and rows that do not fit are reported together."""

import json

import pytest

from qlora_jax.evaluation.tasks.choices import choices_task
from qlora_jax.evaluation.tasks.rows import rows_task
from tests.inference.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_may_call_its_columns_otherwise(tmp_path):
    limits = dict(max_rows=None, max_positions=99)
    rows = [{"problem": "2 + 2?", "solution": "4", "question": "number 7", "answer": "?"}]
    path = write(tmp_path / "rows.jsonl", rows)
    (row,) = rows_task(path, TOKENIZER, file_columns={"prompt": "problem", "completion": "solution"}, **limits).rows
    assert TOKENIZER.decode(row[0].tolist()) == "2 + 2?4<end>"
    questions = [{"problem": "Why?", "choices": ["so", "not so"], "label": 1, "question": "number 7"}]
    path = write(tmp_path / "q.jsonl", questions)
    columns = {"question": "problem", "options": "choices", "answer": "label", "completion": "of another task"}
    (choice,) = choices_task(path, TOKENIZER, file_columns=columns, **limits).choices
    assert TOKENIZER.decode(choice.options[0][0].tolist()) == "Question: Why?\nAnswer: so" and choice.answer == 1
    message = r"(?s)1 of 1 rows.*q.jsonl:1: file_columns: no column 'text' \(found 'problem', 'choices', 'label'"
    with pytest.raises(ValueError, match=message):
        choices_task(path, TOKENIZER, file_columns={"question": "text"}, **limits)


def test_a_row_may_lack_an_optional_column_but_not_all_rows(tmp_path):
    limits = dict(max_rows=None, max_positions=500)
    rows = [{"task": "Add", "ctx": "1 and 2", "answer": "3"}, {"task": "Go", "answer": "gone"}]
    names = {"instruction": "task", "input": "ctx", "output": "answer"}
    path = write(tmp_path / "rows.jsonl", rows)
    first, second = (
        TOKENIZER.decode(ids.tolist()) for ids, _ in rows_task(path, TOKENIZER, file_columns=names, **limits).rows
    )
    assert "1 and 2" in first and "### Input" not in second
    path = write(tmp_path / "one.jsonl", rows[1:])
    with pytest.raises(ValueError, match=r"one\.jsonl: file_columns: no column 'ctx' \(found .*\) in any row"):
        rows_task(path, TOKENIZER, file_columns=names, **limits)


def test_an_error_about_all_rows_is_reported_once_and_is_short(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"title": "x" * 9000, "body": str(n)} for n in range(500)])
    with pytest.raises(ValueError, match="500 of 500 rows can't be used") as error:
        choices_task(path, TOKENIZER, max_rows=None, max_positions=99)
    assert str(error.value).count("found 'title', 'body'") == 1 and len(str(error.value)) < 500


def test_long_rows_are_reported_by_line(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "abc", "completion": "d"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: too long \(found 5 tokens; the model has 4"):
        rows_task(rows, TOKENIZER, max_rows=None, max_positions=4)
    questions = write(tmp_path / "q.jsonl", [{"question": "abc", "options": ["a", "long"], "answer": 0}])
    with pytest.raises(ValueError, match=r"q.jsonl:1: too long \(found 26 tokens; the model has 25"):
        choices_task(questions, TOKENIZER, max_rows=None, max_positions=25)
