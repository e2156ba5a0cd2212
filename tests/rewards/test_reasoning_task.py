"""Rows and scores of reasoning-gym's tasks equal those of the package itself."""

import json

import pytest

from qlora_jax.config.rewards import RewardArgs
from qlora_jax.data.readers.files import content_digest, read_rows, stream_rows
from qlora_jax.rewards.functions import Replies, RewardFunctions

gym = pytest.importorskip("reasoning_gym")
TASKS = [
    "reasoning_gym:letter_counting?size=3&seed=7&min_words=2&max_words=4",
    "reasoning_gym:countdown?size=2&seed=3",
    "reasoning_gym:spell_backward?size=2",
]
SETTINGS = [{"size": 3, "seed": 7, "min_words": 2, "max_words": 4}, {"size": 2, "seed": 3}, {"size": 2, "seed": 0}]
NAMES = ["letter_counting", "countdown", "spell_backward"]


def test_rows_and_scores_equal_those_of_the_package():
    entries, texts, columns, expected = [], [], [], []
    for address, name, settings in zip(TASKS, NAMES, SETTINGS, strict=True):
        dataset = gym.create_dataset(name, **settings)
        rows = [row.data for row in read_rows(address)]
        entries = [*dataset]
        assert rows == [entry | {"prompt": entry["question"], "reasoning_gym": address} for entry in entries]
        for row, entry in zip(rows, entries, strict=True):
            answers = [str(entry["answer"]), "3", "", f"{entry['answer']}."[::-1]]
            texts += [answers[0], f"It is <answer>x</answer> or <answer> {answers[1]} </answer>", *answers[2:]]
            columns += [row] * len(answers)
            expected += [dataset.score_answer(answer, entry) for answer in answers]
    replies = Replies(
        prompts=[row["prompt"] for row in columns],
        completions=texts,
        completion_ids=[[1]] * len(texts),
        columns={
            name: [row.get(name) for row in columns] for name in ("question", "answer", "metadata", "reasoning_gym")
        },
        labels=["t:1"] * len(texts),
    )
    with RewardFunctions(RewardArgs(functions=["reasoning_gym"], workers=1), []) as functions:
        functions.check_columns([*replies.columns])
        found = functions.score(replies).rewards_NF[:, 0]
    assert found.tolist() == expected
    assert 1.0 in expected and 0.0 in expected and len(set(expected)) > 2


def test_an_address_names_the_same_rows_again():
    assert content_digest(TASKS[0]) == content_digest(TASKS[0]) != content_digest(TASKS[0].replace("seed=7", "seed=8"))


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("letter_count", "found the task 'letter_count', expected letter_counting"),
        ("xyzzy", "found the task 'xyzzy', expected one of ab, acre"),
        ("letter_counting?min_word=3", "found the setting 'min_word', expected min_words or max_words"),
        ("letter_counting?min_words=0", r"the task refuses its settings \(min_words must be positive\)"),
    ],
)
def test_an_address_that_names_nothing(address, problem):
    with pytest.raises(ValueError, match=problem):
        next(stream_rows(f"reasoning_gym:{address}"))


def test_a_list_in_an_address_is_a_tuple():
    (row,) = read_rows("reasoning_gym:basic_arithmetic?size=1&operators=[%22%2B%22]&seed=1")
    assert "+" in row.data["question"] and json.dumps(row.data["metadata"], default=str)
