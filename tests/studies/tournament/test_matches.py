"""Prompts of a tournament: ids, categories, and the text that judges read."""

import pytest

from qlora_jax.studies.tournament.matches import read_tournament_prompts
from tests.studies.tournament.tiny_tournament import arena_args, write_lines


def read(folder, rows, **settings):
    path = write_lines(folder / "prompts.jsonl", rows)
    systems = {"a": {"replies": "x"}, "b": {"replies": "y"}}
    return read_tournament_prompts(arena_args(output=str(folder / "arena"), prompts=path, systems=systems, **settings))


def test_ids_categories_and_questions(tmp_path):
    rows = [
        {"question_id": 7, "prompt": "One?", "category": "coding"},
        {"question_id": "x", "messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "-"}]},
        {"question_id": 9, "instruction": "Add.", "input": "1 2"},
        {
            "question_id": 10,
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
        },
    ]
    found = read(tmp_path, rows)
    assert [(prompt.id, prompt.category, prompt.question) for prompt in found] == [
        ("7", "coding", "One?"),
        ("x", None, "Two?"),
        ("9", None, "Add.\n\n1 2"),
        ("10", None, "user: a\n\nassistant: b\n\nuser: c"),
    ]
    assert [prompt.id for prompt in read(tmp_path, rows, max_prompts=2)] == ["7", "x"]


def test_columns_of_other_names(tmp_path):
    rows = [{"number": 1, "text": "One?", "kind": "math", "prompt": "unused"}]
    names = dict(id_column="number", prompt_column="text", category_column="kind")
    (prompt,) = read(tmp_path, rows, **names)
    assert (prompt.id, prompt.category, prompt.question, prompt.row.data["prompt"]) == ("1", "math", "One?", "One?")


def test_rows_without_ids_are_numbered(tmp_path):
    assert [prompt.id for prompt in read(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])] == ["1", "2"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"question_id": 1, "prompt": "a"}, {"prompt": "b"}], r"question_id: found None"),
        ([{"question_id": 1, "prompt": "a"}, {"question_id": "1", "prompt": "b"}], r"id '1' occurs 2 times"),
        ([{"prompt": "a"}, {"prompt": "a"}], r"another row has the same prompt"),
        ([{"text": "a"}], r"no prompt \(found columns 'text'.*Set prompt_column"),
    ],
)
def test_rows_that_cannot_be_used_are_listed(tmp_path, rows, problem):
    with pytest.raises(ValueError, match=problem):
        read(tmp_path, rows)
