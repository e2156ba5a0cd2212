"""Replies that were recorded in a file."""

import pytest

from qlora_jax.tournament.matches import Match
from tests.tournament.tiny_tournament import arena_args, transcripts_of, write_lines, write_tournament


def test_replies_are_found_by_the_id_of_their_prompt(tmp_path):
    settings = write_tournament(tmp_path)
    rows = [{"question_id": str(i), "generation": f"{i}"} for i in (13, 12, 99, 11, 10)]
    path = write_lines(tmp_path / "other.jsonl", rows)
    settings["systems"]["other"] = {"replies": path, "reply_column": "generation"}
    transcripts = transcripts_of(arena_args(**settings))
    assert transcripts.replies["other"] == {"10": "10", "11": "11", "12": "12", "13": "13"}
    assert len(transcripts.matches()) == 4 * 4 * 3
    assert {match.swapped() for match in transcripts.matches()} == {*transcripts.matches()}


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
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, rows, problem):
    settings = write_tournament(tmp_path, prompts=2)
    settings["systems"]["alpha-system"]["replies"] = write_lines(tmp_path / "replies.jsonl", rows)
    with pytest.raises(ValueError, match=problem):
        transcripts_of(arena_args(**settings))
