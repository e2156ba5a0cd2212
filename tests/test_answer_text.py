"""Answers are extracted from texts, and compared by their words, or as numbers."""

import pytest
from sklearn.feature_extraction.text import CountVectorizer

from qlora_jax.answer_text import (
    contains_words,
    extract_answer,
    normalize_number,
    normalize_words,
    words_f1,
)

GSM8K = r"#### (-?[0-9.,]+)"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("a  man, an ape & the\nAnthem", "man ape anthem"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("Theatre", "theatre"),
        ("Beyoncé Knowles-Carter", "beyoncé knowlescarter"),
    ],
)
def test_words_are_normalized_as_in_squad(text, expected):
    assert normalize_words(text) == expected == normalize_words(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,000.00", "1000"),
        ("1000.", "1000"),
        ("-0.50", "-0.5"),
        ("+3", "3"),
        (" 7 ", "7"),
        ("1000000", "1000000"),
        ("0.00", "0"),
        ("-0", "0"),
        (".5", "0.5"),
        ("1e9", "1e9"),
        ("1" * 60, "1" * 60),
        ("seven", "seven"),
        ("3 or 4", "3 or 4"),
        ("", ""),
    ],
)
def test_numbers_are_compared_by_value(text, expected):
    assert normalize_number(text) == expected


@pytest.mark.parametrize(
    ("reply", "answer", "f1", "contains"),
    [
        ("paris", "paris", 1, True),
        ("it is paris in france", "paris", 2 / 6, True),
        ("paris", "paris texas", 2 / 3, False),
        ("parish", "paris", 0, False),
        ("new new york", "new york", 4 / 5, True),
        ("", "paris", 0, False),
        ("", "", 1, False),
        ("york new", "new york", 1, False),
    ],
)
def test_words_in_common(reply, answer, f1, contains):
    assert words_f1(reply, answer) == words_f1(answer, reply) == pytest.approx(f1)
    assert contains_words(reply, answer) == contains


@pytest.mark.parametrize("reply", ["a b b c", "c c", "d e", "b a c d e e"])
def test_f1_is_that_of_counted_words(reply):
    answer = "a b b b c e"
    x, y = CountVectorizer(token_pattern=r"\S+").fit_transform([reply, answer]).toarray()
    common = sum(min(pair) for pair in zip(x, y, strict=True))
    precision, recall = common / x.sum(), common / y.sum()
    assert words_f1(reply, answer) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("  Paris\n", None, "Paris"),
        ("a, b.", None, "a, b."),
        ("48+24 = <<48+24=72>>72\n#### 72", GSM8K, "72"),
        ("#### 1\n#### 1,234,567.", GSM8K, "1234567"),
        ("#### 1,23", GSM8K, "1,23"),
        ("it is 12, or rather -7", NUMBER, "-7"),
        ("no number", NUMBER, None),
        ("x=3", r"y=(\d)|x=(\d)", "3"),
    ],
)
def test_the_answer_in_a_text(text, pattern, expected):
    assert extract_answer(text, pattern) == expected
