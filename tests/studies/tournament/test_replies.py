"""Replies that were recorded in a file."""

import pytest

from qlora_jax.studies.tournament.matches import Match
from tests.studies.tournament.tiny_tournament import arena_args, transcripts_of, write_lines, write_tournament


def test_replies_are_found_by_the_id_of_their_prompt(tmp_path):
    settings = write_tournament(tmp_path)
    rows = [{"question_id": str(i), "generation": f"{i}"} for i in (13, 12, 11, 10)]
    path = write_lines(tmp_path / "other.jsonl", rows)
    settings["systems"]["other"] = {"replies": path, "reply_column": "generation"}
    transcripts = transcripts_of(arena_args(**settings))
    assert transcripts.replies["other"] == {"10": "10", "11": "11", "12": "12", "13": "13"}
    assert len(transcripts.matches()) == 4 * 4 * 3
    assert {match.swapped() for match in transcripts.matches()} == {*transcripts.matches()}


def numbered(folder, ids, *, prompt_ids=(None,) * 9, **settings):
    """The replies of a file with these ids (None: no column) to prompts with those; all have other texts."""
    folder.mkdir(exist_ok=True)
    files = {
        name: [
            {"question_id": id, column: f"{text} {i}"} if id is not None else {column: f"{text} {i}"}
            for i, id in enumerate(given)
        ]
        for name, given, column, text in (
            ("replies", ids, "reply", "reply"),
            ("prompts", prompt_ids, "prompt", "prompt"),
        )
    }
    paths = {name: write_lines(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    systems = {name: {"replies": paths["replies"]} for name in "ab"}
    args = arena_args(output=str(folder / "arena"), prompts=paths["prompts"], systems=systems, **settings)
    return transcripts_of(args).replies["a"]


def test_ids_that_count_from_0_are_refused_if_prompts_have_none(tmp_path):
    """The replies outnumber the prompts in use, so each of these would find one: that to the next prompt."""
    expected = r"question_id: found 0, 10, 11 \(expected ids of prompts: 1, 2, 3.* and 1 more; .* numbered from 1\)"
    problem = rf"3 of 12 rows.*\n.*jsonl:1, 11, 12: {expected}"
    with pytest.raises(ValueError, match=problem):
        numbered(tmp_path, range(12), max_prompts=5)
    assert numbered(tmp_path, range(1, 10), max_prompts=2) == {"1": "reply 0", "2": "reply 1"}
    assert numbered(tmp_path, (None,) * 9, max_prompts=2) == {"1": "reply 0", "2": "reply 1"}


def test_replies_need_ids_if_prompts_have_others_than_their_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"3 of 3 rows.*\n.*question_id: found None.*Give every row an id"):
        numbered(tmp_path, (None,) * 3, prompt_ids=(2, 3, 1))
    assert numbered(tmp_path, (3, 1, 2), prompt_ids=(2, 3, 1)) == {"3": "reply 0", "1": "reply 1", "2": "reply 2"}


def test_an_answer_is_cut_where_another_conversation_begins(tmp_path):
    settings = write_tournament(tmp_path, prompts=1)
    text = "Yes.\nA chat between a curious human and an artificial intelligence assistant. More"
    settings["systems"]["alpha-system"]["replies"] = write_lines(tmp_path / "x", [{"question_id": 10, "reply": text}])
    match = Match("10", "alpha-system", "beta-system")
    assert transcripts_of(arena_args(**settings)).answers(match) == ("Yes.\n", "A fair reply to 0.")


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"question_id": 10, "reply": "a"}], r"no reply to 1 of 2 prompts \(11\)"),
        ([{"question_id": 10, "reply": "a"}] * 2, r"a second reply to the prompt '10'"),
        ([{"question_id": 10, "text": "a"}, {"question_id": 11, "reply": "b"}], r"reply: found None.*Set reply_column"),
        ([{"question_id": 10, "reply": "a"}, {"reply": "b"}], r"question_id: found None"),
        ([{"question_id": i, "reply": "a"} for i in (10, 11, 99)], r"replies.jsonl:3: question_id: found 99"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, rows, problem):
    settings = write_tournament(tmp_path, prompts=2)
    settings["systems"]["alpha-system"]["replies"] = write_lines(tmp_path / "replies.jsonl", rows)
    with pytest.raises(ValueError, match=problem):
        transcripts_of(arena_args(**settings))
