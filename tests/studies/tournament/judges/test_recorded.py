"""Verdicts that were recorded in a file."""

import pytest

from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.recorded import RecordedJudge, read_verdicts
from qlora_jax.studies.tournament.matches import Match, Transcripts
from tests.studies.tournament.tiny_tournament import write_lines

ROW = {"question_id": 1, "model_a": "x", "model_b": "y", "verdict": 1}
NO_TEXTS = Transcripts(prompts={}, replies={})


def test_verdicts_are_given_for_the_matches_asked(tmp_path):
    rows = [ROW | {"question_id": number, "verdict": verdict} for number, verdict in enumerate((1, 2, 3, -1), 1)]
    messages, reporter = [], ProgressReporter()
    reporter.message = messages.append
    judge = RecordedJudge("gpt4", read_verdicts(write_lines(tmp_path / "verdicts.jsonl", rows)), reporter)
    found = []
    asked = [Match("4", "x", "y"), Match("2", "x", "y"), Match("2", "y", "x"), Match("3", "x", "y")]
    judge.judge(asked, NO_TEXTS, found.append)
    assert [(one.match, one.verdict) for one in found] == [*zip(asked, (-1, 2, None, 3), strict=True)]
    (message,) = messages
    assert message.startswith(
        "gpt4: 1 of 4 verdicts are on systems or prompts that do not take part, such as that on x"
    )
    judge.judge([*asked, Match("1", "x", "y")], NO_TEXTS, found.append)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([ROW, ROW | {"verdict": 2}], r"one of 2 verdicts on x and y"),
        ([ROW | {"model_b": "x"}], r"model_a, model_b: the same system"),
        ([ROW | {"verdict": 4}], r"verdict: found 4, expected 1, 2, 3 or -1"),
        ([ROW | {"verdict": True}], r"verdict: found True"),
        ([ROW | {"model_a": ""}], r"model_a: found '', expected the name"),
        ([ROW | {"question_id": None}], r"question_id: found None"),
    ],
)
def test_malformed_files_are_refused(tmp_path, rows, problem):
    with pytest.raises(ValueError, match=problem):
        read_verdicts(write_lines(tmp_path / "verdicts.jsonl", rows))
