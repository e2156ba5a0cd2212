"""A judge's preferences between two models: both orders, resumption, unreadable and missing verdicts."""

import numpy as np
import pytest

from qlora_jax.config.parse import from_dict
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.judge import FIRST, SECOND, TIE, UNREADABLE, Judgement
from qlora_jax.studies.variance.analysis import add_preferences, analyse
from qlora_jax.studies.variance.questions import Question
from qlora_jax.studies.variance.replies import Observed, ObservedReply
from qlora_jax.studies.variance.settings import VarianceArgs, design_of

QUESTIONS = [Question(Row(Place(n + 1, n), {}), f"question {n}", []) for n in range(4)]
QUALITY = {"first": [[1, 2, 3, 1], [1, 1, 3, 3]], "second": [[2, 2, 1, 4], [2, 0, 1, 4]]}  # by seed and prompt
PREFERRED = [[1, 0, -1, 1], [1, -1, -1, 1]]
SETTINGS = {
    "models": {"first": "a", "second": "b"},
    "prompts": "rows.jsonl",
    "fixed": {"temperature": 1},
    "vary": {"seed": [0, 1]},
    "measures": ["judge"],
}


class NumberJudge:
    """Prefers the reply with the larger number, but on the prompts in `odd` its verdict is always `verdict`."""

    remembers = False

    def __init__(self, verdict=None, odd=()):
        self.verdict, self.odd, self.asked = verdict, odd, []

    def inputs(self):
        return {"kind": "numbers"}

    def judge(self, matches, transcripts, record):
        self.asked += matches
        for match in matches:
            first, second = map(int, transcripts.answers(match))
            if transcripts.question(match) in self.odd:
                record(Judgement(match, self.verdict, problem="no network"))
            else:
                record(Judgement(match, FIRST if first > second else SECOND if second > first else TIE))


class Messages(ProgressReporter):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def _preference(observed):
    assert observed.preference is not None
    return observed.preference.tolist()


def study(folder, judge):
    """(the second model's preferences by seed and prompt, the splits, the messages)."""
    args = from_dict(VarianceArgs, SETTINGS | {"output": str(folder)})
    design, reporter = design_of(args), Messages()
    seeds = [*design.factors["seed"].values()]
    observations = {
        model: {
            seed: Observed([ObservedReply(prompt="", reply=str(one), end="stop", tokens=1) for one in row], None)
            for seed, row in zip(seeds, rows, strict=True)
        }
        for model, rows in QUALITY.items()
    }
    found = add_preferences(args, judge, QUESTIONS, observations, reporter)
    by_model = {model: [_preference(of_model[seed]) for seed in seeds] for model, of_model in found.items()}
    assert not np.any(by_model["first"])
    return by_model["second"], analyse(args, design, QUESTIONS, found), reporter


def test_preferences_are_split_as_differences(tmp_path):
    judge = NumberJudge()
    preferred, (split,), reporter = study(tmp_path, judge)
    assert preferred == PREFERRED
    # Six pairs of texts in two orders: two prompts have the same replies with both seeds.
    assert len(judge.asked) == len({*judge.asked}) == 12
    assert (split.models, split.mean) == (["first", "second"], np.mean(PREFERRED))
    assert split.level_means == {"0": 0.25, "1": 0.0}
    assert reporter.lines == []


def test_a_judge_that_always_prefers_the_first_reply_prefers_no_model(tmp_path):
    preferred, _, _ = study(tmp_path, NumberJudge(FIRST, odd=[question.prompt for question in QUESTIONS]))
    assert not np.any(preferred)


def test_unreadable_reviews_count_as_equal_and_are_reported(tmp_path):
    preferred, _, reporter = study(tmp_path, NumberJudge(UNREADABLE, odd=["question 0"]))
    assert preferred == [[0, 0, -1, 1], [0, -1, -1, 1]]
    assert reporter.lines == ["judge: 2 of 12 reviews on second are unreadable, and count as equal"]


def test_missing_verdicts_end_the_study_and_only_they_are_asked_again(tmp_path):
    with pytest.raises(ValueError, match=r"judge: 2 of 12 verdicts on second are missing \(no network\)\. Remove"):
        study(tmp_path, NumberJudge(odd=["question 2"]))
    judge = NumberJudge()
    assert study(tmp_path, judge)[0] == PREFERRED
    assert len(judge.asked) == 2
