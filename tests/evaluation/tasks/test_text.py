"""Questions in the shapes they come in, and rows that can't be scored."""

import json

import numpy as np
import pytest

from qlora_jax.evaluation.tasks.question_rows import read_question, split_lettered
from qlora_jax.evaluation.tasks.text import choice_task, rows_task, text_task
from tests.inference.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
LETTERED = "A. one\nB. two\nlines of it\nC. B. three"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. x\nB. y", ["x", "y"]),
        (LETTERED, ["one", "two\nlines of it", "B. three"]),
        ("A. x\nC. y", ["x\nC. y"]),
        ("see:\nA. x\nB. y", []),
        ("x or y", []),
    ],
)
def test_lettered_options(text, options):
    assert split_lettered(text) == options


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["yes", "no"], 1, 1),
        (["yes", "no"], "no", 1),
        (["yes", "no"], "b", 1),
        (["B", "A"], "A", 1),  # a text comes before a letter
        (LETTERED, "C. B. three", 2),
        (LETTERED, "B. two\nlines of it", 1),
        (LETTERED, "B", 1),
        (["A. x", "y"], "A. x", 0),
    ],
)
def test_answers(options, answer, expected):
    assert read_question({"question": "q", "options": options, "answer": answer}).answer == expected
    assert read_question({"prompt": "q", "options": options, "answer": answer}).prompt == "q"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "options": ["a", "b"]},
            "no column 'answer': it has 'question', 'options', expected question",
        ),
        ({"question": "q", "options": ["a"], "answer": 0}, "options: expected a list of two or more"),
        ({"question": "q", "options": "a or b", "answer": 0}, "options: expected"),
        ({"question": "q", "options": "a or b" * 99, "answer": 0}, r"found 'a or ba or.{40,50}\.\.\.$"),
        ({"question": ["q"], "options": ["a", "b"], "answer": 0}, r"question: expected a text; found \['q'\]"),
        (
            {"problem": "q", "choices": ["a", "b"], "answer": 0},
            r"no column 'question' or 'options': it has 'problem', 'choices', 'answer', expected question "
            r"\(or prompt\), options, answer. Tell which they are: --file_columns "
            r"'{question: problem, options: choices}' \(--questions.file_columns in training\)$",
        ),
        ({"q": "q", "options": ["a", "b"], "answer": 0}, "file_columns '{question: COLUMN}'"),
        ({"question": "q", "options": ["a", ""], "answer": 0}, "options: expected"),
        ({"question": "q", "options": ["a", "b"], "answer": 2}, "answer 2 is none of the 2 options"),
        ({"question": "q", "options": ["a", "b"], "answer": True}, "answer True is none"),
        ({"question": "q", "options": ["a", "b"], "answer": "C"}, "answer 'C' is none"),
        ({"question": "q", "options": "A. x\nB. y", "answer": "A. y"}, "answer 'A. y' is none"),
    ],
)
def test_questions_that_are_none(row, message):
    with pytest.raises(ValueError, match=message):
        read_question(row)


def test_a_file_may_call_its_columns_otherwise(tmp_path):
    limits = dict(max_rows=None, max_positions=99)
    rows = [{"problem": "2 + 2?", "solution": "4", "question": "number 7", "answer": "?"}]
    path = write(tmp_path / "rows.jsonl", rows)
    (row,) = rows_task(path, TOKENIZER, named={"prompt": "problem", "completion": "solution"}, **limits).rows
    assert TOKENIZER.decode(row[0].tolist()) == "2 + 2?4<end>"
    questions = [{"problem": "Why?", "choices": ["so", "not so"], "label": 1, "question": "number 7"}]
    path = write(tmp_path / "q.jsonl", questions)
    named = {"question": "problem", "options": "choices", "answer": "label", "completion": "of another task"}
    (choice,) = choice_task(path, TOKENIZER, named=named, **limits).choices
    assert TOKENIZER.decode(choice.options[0][0].tolist()) == "Question: Why?\nAnswer: so" and choice.answer == 1
    told = (
        r"(?s)1 of 1 rows.*q.jsonl:1: no column 'text', which file_columns names; it has 'problem', 'choices', 'label'"
    )
    with pytest.raises(ValueError, match=told):
        choice_task(path, TOKENIZER, named={"question": "text"}, **limits)


def test_a_wrong_file_is_told_once_and_in_short(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"title": "x" * 9000, "body": str(n)} for n in range(500)])
    with pytest.raises(ValueError, match="500 of 500 rows can't be used") as error:
        choice_task(path, TOKENIZER, max_rows=None, max_positions=99)
    assert str(error.value).count("it has 'title', 'body'") == 1 and len(str(error.value)) < 500


def test_only_the_option_is_scored(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "Why?", "options": ["so", "ü"], "answer": "so"}])
    (choice,) = choice_task(path, TOKENIZER, max_rows=None, max_positions=99).choices
    texts = [(TOKENIZER.decode(ids.tolist()), TOKENIZER.decode(ids[scored].tolist())) for ids, scored in choice.options]
    assert texts == [("Question: Why?\nAnswer: so", " so"), ("Question: Why?\nAnswer: ü", " ü")]
    assert choice.answer == 0


def test_a_text_in_windows(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij")
    task = text_task(str(tmp_path / "text.txt"), TOKENIZER, window=4, stride=None, max_tokens=7, max_positions=4)
    assert [TOKENIZER.decode(ids.tolist()) for ids, _ in task.rows] == ["abcd", "efg"]
    assert task.title.endswith("2 windows of 4 tokens, 5 scored")
    with pytest.raises(ValueError, match="window=4: the model reads 3"):
        text_task(str(tmp_path / "text.txt"), TOKENIZER, window=4, stride=None, max_tokens=7, max_positions=3)


def test_rows_score_what_training_learns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "cd"}] * 3)
    task = rows_task(path, TOKENIZER, max_rows=2, max_positions=5)
    assert len(task.rows) == 2
    assert [TOKENIZER.decode(ids[scored].tolist()) for ids, scored in task.rows] == ["cd<end>"] * 2
    np.testing.assert_array_equal(task.rows[0][1], [False, False, True, True, True])


def test_long_rows_are_told_by_line(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "abc", "completion": "d"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: 5 tokens, and the model reads 4"):
        rows_task(rows, TOKENIZER, max_rows=None, max_positions=4)
    questions = write(tmp_path / "q.jsonl", [{"question": "abc", "options": ["a", "long"], "answer": 0}])
    with pytest.raises(ValueError, match=r"q.jsonl:1: 26 tokens, and the model reads 25"):
        choice_task(questions, TOKENIZER, max_rows=None, max_positions=25)


def test_the_given_start_of_an_answer_is_not_scored(tmp_path):
    good, bad = {"prompt": "ab", "completion": "T: cd"}, {"prompt": "ab", "completion": "cd"}
    limits = dict(max_rows=None, max_positions=99, answer_start="T:")
    task = rows_task(write(tmp_path / "rows.jsonl", [good] * 2), TOKENIZER, **limits)
    assert [TOKENIZER.decode(ids[scored].tolist()) for ids, scored in task.rows] == [" cd<end>"] * 2
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the answer begins with 'cd', expected 'T:'"):
        rows_task(write(tmp_path / "rows.jsonl", [good, bad]), TOKENIZER, **limits)
