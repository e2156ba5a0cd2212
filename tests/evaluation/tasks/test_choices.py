"""Options are scored as replies to their question; the likeliest one is the answer."""

import json

import numpy as np
import pytest

from qlora_jax.evaluation.tasks.choices import ChoiceQuestion, choices_task, score_choices
from tests.evaluation.reference import expected_scores, greedy_row
from tests.inference.tiny import VOCAB, byte_tokenizer, tiny_parts

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_only_the_option_is_scored(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "Why?", "options": ["so", "ü"], "answer": "so"}])
    (choice,) = choices_task(path, TOKENIZER, max_rows=None, max_positions=99).choices
    texts = [(TOKENIZER.decode(ids.tolist()), TOKENIZER.decode(ids[scored].tolist())) for ids, scored in choice.options]
    assert texts == [("Question: Why?\nAnswer: so", " so"), ("Question: Why?\nAnswer: ü", " ü")]
    assert choice.answer == 0


def test_choices_by_sum_and_by_mean(parts):
    rng = np.random.default_rng(6)
    prompt = rng.integers(0, VOCAB, 6).astype(np.int32)
    options = [
        (np.concatenate([prompt, rng.integers(0, VOCAB, n).astype(np.int32)]), np.arange(6 + n) >= 6) for n in (1, 3, 9)
    ]
    nll = np.array([expected_scores(parts, *option)[0] for option in options])
    by_sum, by_mean = int(nll.argmin()), int((nll / (1, 3, 9)).argmin())
    scores = score_choices(parts, [ChoiceQuestion(options=options, answer=answer) for answer in range(3)])
    assert scores.by_sum.tolist() == [answer == by_sum for answer in range(3)]
    assert scores.by_mean.tolist() == [answer == by_mean for answer in range(3)]
    assert by_sum != by_mean and not scores.tied_by_sum.any()


def test_a_tie_is_reported_and_not_right(parts):
    likely, unlikely = (
        greedy_row(parts, np.array([5, 6], np.int32), 2),
        (np.array([5, 6, 7, 8], np.int32), np.arange(4) >= 2),
    )
    choices = [
        ChoiceQuestion(options=[likely, likely, unlikely], answer=0),
        ChoiceQuestion(options=[likely, unlikely, unlikely], answer=2),
    ]
    scores = score_choices(parts, choices)
    assert scores.by_sum.tolist() == [False, False]
    assert scores.tied_by_sum.tolist() == [True, False]
