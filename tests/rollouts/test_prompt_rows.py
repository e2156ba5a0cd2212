"""Prompts of a run: their ids are those that `generate` gives the model, and rewards see every column."""

import json

import pytest

from qlora_jax.config import DataArgs, ModelArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.readers.files import read_rows
from qlora_jax.inference.prompts import encode_prompts, prompter
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import open_tokenizer
from qlora_jax.rollouts.prompt_rows import read_prompt_rows
from tests.e2e.project import write_model

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, {"role": "user", "content": "say sun"}, {"role": "assistant", "content": "sun"}]
ROWS = [{"prompt": "say sun"}, {"prompt": TURNS[:2], "hint": "s"}, {"prompt": " say moon\n", "answer": "moon"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"))
    return open_tokenizer(open_model(str(folder), lambda: None), ModelArgs(path=str(folder)), 258)


def dataset_of(tokenizer, path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArgs(train=str(path), max_length=64, **settings)
    how = {"seed": 0, "micro_batch_size": 1, "accumulation": 1, "objective": "grpo", "reply_tokens": 8}
    return data, load_dataset(data, tokenizer, **how)


@pytest.mark.parametrize("rows", [ROWS, [{"messages": TURNS}, {"messages": TURNS[1:2]}]], ids=["prompt", "messages"])
def test_a_prompt_has_the_ids_that_generation_gives_it(tokenizer, tmp_path, rows):
    path = tmp_path / "prompts.jsonl"
    _, dataset = dataset_of(tokenizer, path, rows)
    named = [
        row if "messages" in row or isinstance(row["prompt"], str) else {"messages": row["prompt"]} for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    expected = encode_prompts(str(path), read_rows(str(path)), prompter(dataset.tokenizer, raw=False, system=None), 200)
    assert [dataset.train.row(index)[0][:-1].tolist() for index in range(len(rows))] == expected


def test_rewards_see_every_column(tokenizer, tmp_path):
    data, dataset = dataset_of(tokenizer, tmp_path / "prompts.jsonl", ROWS)
    found = read_prompt_rows(data, dataset.train.files, {str(data.train): "prompt"})
    assert found.names == ("answer", "hint")
    assert [found.prompt(number) for number in range(3)] == [row["prompt"] for row in ROWS]
    assert found.others(1) == {"hint": "s"}


def test_a_prompt_that_leaves_no_room_is_told_by_its_line(tokenizer, tmp_path):
    rows = [*ROWS, {"prompt": "x" * 60}]
    with pytest.raises(ValueError, match=r"prompts.jsonl:4: found \d+ tokens in the prompt, expected at most 56"):
        dataset_of(tokenizer, tmp_path / "prompts.jsonl", rows)
    _, dataset = dataset_of(tokenizer, tmp_path / "prompts.jsonl", rows, overlong="drop")
    assert len(dataset.train) == 3
