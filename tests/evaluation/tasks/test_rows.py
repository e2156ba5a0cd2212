"""Rows of training data are scored on the tokens that training learns."""

import json

import numpy as np
import pytest

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
