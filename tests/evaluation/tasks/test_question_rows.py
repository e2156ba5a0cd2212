"""Multiple-choice questions are read from rows in several forms."""

import pytest

from qlora_jax.evaluation.tasks.question_rows import read_question, split_lettered

LETTERED = "A. one\nB. two\nlines of it\nC. B. three"


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
            r"no column 'answer' \(found 'question', 'options', expected question",
        ),
        ({"question": "q", "options": ["a"], "answer": 0}, r"options: found \['a'\], expected a list of two or more"),
        ({"question": "q", "options": "a or b", "answer": 0}, "options: found 'a or b', expected"),
        ({"question": "q", "options": "a or b" * 99, "answer": 0}, r"found 'a or ba or.{40,50}\.\.\., expected"),
        ({"question": ["q"], "options": ["a", "b"], "answer": 0}, r"question: found \['q'\], expected a text"),
        (
            {"problem": "q", "choices": ["a", "b"], "answer": 0},
            r"no column 'question' or 'options' \(found 'problem', 'choices', 'answer', expected question "
            r"\(or prompt\), options, answer\). Set --file_columns "
            r"'{question: problem, options: choices}' \(--questions.file_columns in training\)$",
        ),
        ({"q": "q", "options": ["a", "b"], "answer": 0}, "file_columns '{question: COLUMN}'"),
        ({"question": "q", "options": ["a", ""], "answer": 0}, "options: found"),
        ({"question": "q", "options": ["a", "b"], "answer": 2}, "answer: found 2, expected one of the 2 options"),
        ({"question": "q", "options": ["a", "b"], "answer": True}, "answer: found True, expected one of"),
        ({"question": "q", "options": ["a", "b"], "answer": "C"}, "answer: found 'C', expected one of"),
        ({"question": "q", "options": "A. x\nB. y", "answer": "A. y"}, "answer: found 'A. y', expected one of"),
    ],
)
def test_malformed_questions(row, message):
    with pytest.raises(ValueError, match=message):
        read_question(row)
