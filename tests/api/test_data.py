"""Data in memory becomes the same batches as its file."""

import json

import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.api.data import _line, write_data
from qlora_jax.config import ModelArgs
from qlora_jax.io.pretrained import open_base
from tests.e2e.project import write_model, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return open_base(ModelArgs(path=str(write_model(tmp_path_factory.mktemp("data") / "model")))).tokenizer


def first_batches(dataset, count=3):
    return [batch.arrays() for _, batch in zip(range(count), dataset.train_batches(), strict=False)]


def test_rows_in_memory_give_the_batches_of_their_file(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    settings = {"max_length": 160, "micro_batch_size": 2, "accumulation": 2, "config": {"data.buckets": 2}}
    of_file = q.prepare_data(path, tokenizer, **settings)
    of_rows = q.prepare_data(rows, tokenizer, eval_data=rows[:4], **settings)
    for expected, found in zip(first_batches(of_file), first_batches(of_rows), strict=True):
        assert expected.keys() == found.keys() >= {"inputs", "targets", "weights"}
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert of_file.eval is None and of_rows.eval is not None and len(of_rows.eval) == 4


def test_columns_and_bad_rows_are_arguments(tokenizer):
    rows = [{"question": f"Is {n} odd?", "answer": "yes" if n else ""} for n in range(8)]
    report = q.prepare_data(
        rows, tokenizer, columns={"prompt": "question", "completion": "answer"}, bad_rows="drop"
    ).report
    assert (report.train.kept, report.train.bad, report.train.form) == (7, 1, "completion")


def test_prompts_leave_room_for_a_reply(tokenizer):
    rows = [{"prompt": f"Is {n} odd?"} for n in range(4)]
    settings = {"objective": "grpo", "rollouts.max_completion_length": 8}
    train = q.prepare_data(rows, tokenizer, config=settings).train
    longest = max(len(train.row(row)[0]) - 1 for row in range(len(train)))  # a filler follows the prompt
    q.prepare_data(rows, tokenizer, max_length=longest + 8, config=settings)
    with pytest.raises(ValueError, match=r"train\.jsonl:1"):
        q.prepare_data(rows, tokenizer, max_length=longest + 7, config=settings)


def test_malformed_rows_in_memory_are_reported(tokenizer):
    with pytest.raises(ValueError, match=r"train\.jsonl"):
        q.prepare_data([{"neither": "column"}], tokenizer)


@pytest.mark.parametrize("row", ["say sun", ("say sun", "sun"), None])
def test_a_row_that_is_not_a_mapping_is_an_error_that_shows_it(row):
    with pytest.raises(ValueError, match=rf"^data: row 1 is .*\({type(row).__name__}\), expected a dict such as"):
        _line(1, row)


def test_rows_of_a_call_that_failed_are_replaced_but_those_of_a_run_are_not(tmp_path):
    write_data([{"promt": "typing mistake"}], None, tmp_path, resume=False)
    write_data([{"prompt": "corrected"}], None, tmp_path, resume=False)
    assert json.loads((tmp_path / "train.jsonl").read_text()) == {"prompt": "corrected"}
    with pytest.raises(ValueError, match=r"train\.jsonl: the run was started with other rows"):
        write_data([{"prompt": "other"}], None, tmp_path, resume=True)


def test_the_objective_of_the_config_decides_the_rows(tokenizer):
    pairs = [{"prompt": "say sun", "chosen": "sun", "rejected": "moon" * n} for n in range(1, 5)]
    dataset = q.prepare_data(pairs, tokenizer, config={"objective": "dpo"})
    arrays = next(iter(dataset.train_batches())).arrays()
    assert (dataset.branching, dataset.sequences) == (True, 2) and {"parents", "depths", "sequences"} <= arrays.keys()
    answers = [{"prompt": f"say {n}", "completion": str(n), "label": n % 2} for n in range(4)]
    assert q.prepare_data(answers, tokenizer, config={"objective": "kto"}).sequences == 2  # with KL pairs
    texts = [{"text": f"say {n}", "label": "no"} for n in range(4)]
    named = q.prepare_data(texts, tokenizer, config={"objective": "classification", "head.labels": ["yes", "no"]})
    assert named.labels == ("yes", "no")
    with pytest.raises(ValueError, match="sft trains on texts or conversations with answers"):
        q.prepare_data(pairs, tokenizer)
