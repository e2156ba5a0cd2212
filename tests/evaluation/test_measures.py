"""The rows' parts of each measure add up to the metric of that name."""

import numpy as np
import pytest

from qlora_jax.evaluation.loglikelihood import RowScores
from qlora_jax.evaluation.measures import MEASURES
from qlora_jax.evaluation.results import Evaluation, task_result
from qlora_jax.evaluation.tasks.answers import AnswerScores, AnswersTask
from qlora_jax.evaluation.tasks.choices import ChoiceScores, ChoicesTask
from qlora_jax.evaluation.tasks.letters import LetterScores, LettersTask
from qlora_jax.evaluation.tasks.rows import RowsTask
from qlora_jax.evaluation.tasks.text import TextTask
from tests.inference.tiny import byte_tokenizer

RNG = np.random.default_rng(0)
RIGHT = RNG.uniform(size=(4, 9)) < 0.5
ROWS = RowScores(nll=RNG.uniform(size=9), tokens=np.arange(1, 10), exact=RIGHT[0], begins=RIGHT[1])
LETTERS = LettersTask(title="", questions=[], subjects=list("aabbbcccc"))
ANSWERS = AnswersTask(
    title="", questions=[], tokenizer=byte_tokenizer(), pattern=None, max_new_tokens=1, stop_ids=(), until=None
)
CHOICES = ChoiceScores(by_sum=RIGHT[0], tied_by_sum=RIGHT[2], by_mean=RIGHT[1], tied_by_mean=RIGHT[3])
CASES = [
    (TextTask(title="", rows=[]), ROWS),
    (RowsTask(title="", rows=[]), ROWS),
    (ChoicesTask(title="", choices=[]), CHOICES),
    (LETTERS, LetterScores(right=RIGHT[0], tied=RIGHT[1])),
    (ANSWERS, AnswerScores(right=RIGHT[0], unanswered=RIGHT[1], cut_off=RIGHT[2])),
]


@pytest.mark.parametrize(("task", "scores"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_the_rows_add_up_to_the_metric(task, scores):
    result = task_result(task, {"checkpoint": scores})
    evaluation = Evaluation(labels={"checkpoint": "run"}, tasks={task.name: result})
    found = evaluation.to_dict(rows=True)["tasks"][task.name]
    assert set(found["rows"]["checkpoint"]) == set(MEASURES[task.name])
    for name, rows in found["rows"]["checkpoint"].items():
        assert len(rows["values"]) == 9
        assert sum(rows["values"]) / sum(rows["weights"]) == pytest.approx(
            found["columns"]["checkpoint"][name]["value"]
        )
    assert "rows" not in evaluation.to_dict()["tasks"][task.name]


def test_every_measure_is_tested():
    assert {task.name for task, _ in CASES} == set(MEASURES)
