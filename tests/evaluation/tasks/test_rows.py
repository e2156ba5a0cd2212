"""Rows of training data are scored on the tokens that training learns."""

import dataclasses
import json

import numpy as np
import pytest

from qlora_jax.evaluation.loglikelihood import RowScores
from qlora_jax.evaluation.statistics import bootstrap, paired_bootstrap
from qlora_jax.evaluation.tasks.rows import rows_task
from tests.inference.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_score_what_training_learns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "cd"}] * 3)
    task = rows_task(path, TOKENIZER, max_rows=2, max_positions=5)
    assert len(task.rows) == 2
    assert [TOKENIZER.decode(ids[scored].tolist()) for ids, scored in task.rows] == ["cd<end>"] * 2
    np.testing.assert_array_equal(task.rows[0][1], [False, False, True, True, True])


def test_the_given_start_of_an_answer_is_not_scored(tmp_path):
    good, bad = {"prompt": "ab", "completion": "T: cd"}, {"prompt": "ab", "completion": "cd"}
    limits = dict(max_rows=None, max_positions=99, answer_start="T:")
    task = rows_task(write(tmp_path / "rows.jsonl", [good] * 2), TOKENIZER, **limits)
    assert [TOKENIZER.decode(ids[scored].tolist()) for ids, scored in task.rows] == [" cd<end>"] * 2
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the answer begins with 'cd', expected 'T:'"):
        rows_task(write(tmp_path / "rows.jsonl", [good, bad]), TOKENIZER, **limits)


def test_losses_of_the_groups_of_a_column(tmp_path):
    languages = ["de", "fr", "de", "eo", "de"]
    rows = [{"prompt": "ab", "completion": "c" * (n + 1), "lang": lang} for n, lang in enumerate(languages)]
    task = rows_task(write(tmp_path / "rows.jsonl", rows), TOKENIZER, max_rows=None, max_positions=99, by="lang")
    before, after = (
        RowScores(nll=nll, tokens=np.arange(2, 7), exact=np.ones(5, bool), begins=np.ones(5, bool))
        for nll in (np.arange(5.0), np.arange(5.0) ** 2)
    )
    found = {metric.name: metric for metric in task.metrics(before)}
    assert [*found][4:] == [f"loss per token, lang {group}" for group in ("de (3 rows)", "fr (1 rows)", "eo (1 rows)")]
    german = found["loss per token, lang de (3 rows)"]
    assert german.value == (0 + 2 + 4) / (2 + 4 + 6)
    assert german.interval == bootstrap(np.array([0.0, 2, 4]), np.array([2, 4, 6]))
    changes = {change.name: change for change in task.compare(before, after)}
    assert changes["loss per token, lang de (3 rows)"].difference == pytest.approx((4 + 16 - 6) / 12)
    expected = paired_bootstrap(np.array([0.0, 2, 4]), np.array([0.0, 4, 16]), np.array([2, 4, 6]))
    assert changes["loss per token, lang de (3 rows)"].interval == expected


def test_a_row_without_the_column_of_groups_is_reported(tmp_path):
    rows = [{"prompt": "ab", "completion": "c", "lang": "de"}, {"prompt": "ab", "completion": "c", "lang": None}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: by: found None in column 'lang', expected a text"):
        rows_task(write(tmp_path / "rows.jsonl", rows), TOKENIZER, max_rows=None, max_positions=99, by="lang")


def test_a_row_of_several_texts_is_an_error(tmp_path):
    """The template writes the last answer in another way, so the first is learned in a branch."""
    template = "{% for m in messages %}{{ '*' if loop.last and m.role == 'assistant' }}{{ m.content }}<end>{% endfor %}"
    tokenizer = dataclasses.replace(TOKENIZER, chat_template=template)
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant")]
    one, two = {"messages": turns}, {"messages": turns * 2}
    assert len(rows_task(write(tmp_path / "one.jsonl", [one]), tokenizer, max_rows=None, max_positions=99).rows) == 1
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the chat template writes a turn differently"):
        rows_task(write(tmp_path / "rows.jsonl", [one, two]), tokenizer, max_rows=None, max_positions=99)
