"""Pairs for the benchmark: questions are read, wrong samples differ from right ones, and prompts get their share."""

import pytest

from scripts.bench.make_preference_pairs import (
    MIN_ANSWER,
    Question,
    is_right,
    nearest_to_share,
    read_question,
    sample_length,
)


def test_questions_of_both_sets_are_read():
    gsm = read_question({"question": "How many?", "answer": "2 + 1,000\n#### 1,002"})
    assert gsm == Question([{"role": "user", "content": "How many?"}], "2 + 1,000\n#### 1,002", 1002)
    turns = "### Human: Hi ### Assistant: Hello ### Human: Why? ### Assistant:"
    found = read_question({"input": turns, "output": "So.", "lang": "en"})
    assert [(turn["role"], turn["content"]) for turn in found.prompt] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Why?"),
    ]
    assert (found.answer, found.result) == ("So.", None)


@pytest.mark.parametrize(
    ("row", "problem"), [({"text": "a"}, "found columns text"), ({"input": "### Human: a", "output": "b"}, "no '###")]
)
def test_other_rows_are_refused(row: dict, problem: str):
    with pytest.raises(ValueError, match=problem):
        read_question(row)


def test_a_sample_is_right_if_it_ends_with_the_result():
    question = Question([], "#### 1002", 1002)
    assert is_right(question, "It is 7, so 1,002.") and not is_right(question, "1002 or 7")
    assert is_right(question, "He pays $1,002.00.") and not is_right(question, "It is 1002.5")
    assert not is_right(question, "many") and not is_right(question._replace(result=None), "1002")


def test_prompts_have_the_share_that_was_asked_for():
    lengths = [(10, 90), (50, 50), (60, 45), (95, 20)]
    assert nearest_to_share(lengths, 0.5) == [1, 2, 3, 0]
    for prompt, answer in lengths[1:]:
        sample = sample_length(prompt, answer, 0.5)
        assert 2 * prompt / (2 * prompt + answer + sample) == pytest.approx(0.5, abs=0.01)
    assert sample_length(10, 90, 0.5) == MIN_ANSWER
