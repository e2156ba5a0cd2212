"""The rows' parts of each measure add up to the metric of that name."""

import numpy as np
import pytest

from qlora_jax.evaluation.heads.rows import HeadRows
from qlora_jax.evaluation.results import Evaluation, task_result
from qlora_jax.evaluation.task import MEASURES, measures_of
from qlora_jax.evaluation.tasks.answers import AnswerScores, AnswersTask
from qlora_jax.evaluation.tasks.choices import ChoiceScores, ChoicesTask
from qlora_jax.evaluation.tasks.head_labels import HeadLabelsTask
from qlora_jax.evaluation.tasks.labels import LabelsTask
from qlora_jax.evaluation.tasks.letters import LetterScores, LettersTask
from qlora_jax.evaluation.tasks.pairs import PairScores, PairsTask
from qlora_jax.evaluation.tasks.programs import ProgramScores, ProgramsTask
from qlora_jax.evaluation.tasks.reward_pairs import RewardPairsTask
from qlora_jax.evaluation.tasks.rows import RowsTask
from qlora_jax.evaluation.tasks.text import TextTask
from qlora_jax.inference.sampling_params import GREEDY
from qlora_jax.measures.metrics import RowScores
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.sandbox.programs import Limits
from tests.inference.tiny import byte_tokenizer

RNG = np.random.default_rng(0)
RIGHT = np.arange(9) < np.array([[2], [4], [5], [7]])  # four shares, so that no two can be confused
ROWS = RowScores(nll=RNG.uniform(size=9), tokens=np.arange(1, 10), exact=RIGHT[0], begins=RIGHT[1])
LETTERS = LettersTask(title="", questions=[], subjects=list("aabbbcccc"))
ANSWERS = AnswersTask(
    title="", questions=[], tokenizer=byte_tokenizer(), pattern=None, max_new_tokens=1, stop_ids=(), until=None
)
CHOICES = ChoiceScores(by_sum=RIGHT[0], tied_by_sum=RIGHT[2], by_mean=RIGHT[1], tied_by_mean=RIGHT[3])
LABELS = LabelsTask(
    title="",
    path="",
    places=[],
    labels=["a", "b"],
    options=[],
    prior=None,
    answers=RIGHT[0].astype(np.int64),
    label_score="sum",
)
NO_ROWS = HeadRows(path="", places=[], texts=[], values=[])
CLASSES = TrainedHead(objective="classification", labels=("a", "b"))
SEVERAL = TrainedHead(objective="multi_label", labels=("a", "b"))
NUMBERS = TrainedHead(objective="regression")
PROGRAMS = ProgramsTask(
    title="",
    problems=[],
    tokenizer=byte_tokenizer(),
    samples=2,
    pass_at=[1],
    sampling=GREEDY,
    max_new_tokens=1,
    stop_ids=(),
    limits=Limits(),
    sealed=True,
)
CASES = [
    (TextTask(title="", rows=[]), ROWS),
    (RowsTask(title="", rows=[]), ROWS),
    (ChoicesTask(title="", choices=[]), CHOICES),
    (LETTERS, LetterScores(right=RIGHT[0], tied=RIGHT[1])),
    (
        ANSWERS,
        AnswerScores(
            right=RIGHT[0], unanswered=RIGHT[1], cut_off=RIGHT[2], contains=RIGHT[3], f1=RIGHT[3].astype(np.float64)
        ),
    ),
    (
        PairsTask(title="", sequences=[], beta=0.1),
        PairScores(
            nll_P2=RNG.uniform(size=(9, 2)),
            tokens_P2=RNG.integers(1, 9, size=(9, 2)),
            reference_P2=RNG.uniform(size=(9, 2)),
        ),
    ),
    (LABELS, RIGHT[1].astype(np.int64)),
    (PROGRAMS, ProgramScores(outcomes=np.stack([RIGHT[0], RIGHT[1]], axis=1).astype(np.int64), cut_off=0)),
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


HEADED = [
    (HeadLabelsTask(title="", head=CLASSES, rows=NO_ROWS, answers=RNG.integers(0, 2, (9, 1)).astype(float)), (9, 2)),
    (HeadLabelsTask(title="", head=SEVERAL, rows=NO_ROWS, answers=RNG.integers(0, 2, (9, 2)).astype(float)), (9, 2)),
    (HeadLabelsTask(title="", head=NUMBERS, rows=NO_ROWS, answers=RNG.normal(size=(9, 1))), (9, 1)),
    (RewardPairsTask(title="", rows=NO_ROWS), (9, 2)),
]


@pytest.mark.parametrize(("task", "shape"), HEADED, ids=["classification", "multi_label", "regression", "reward"])
def test_the_rows_of_heads_add_up_to_the_metric(task, shape, request):
    result = task_result(task, {"checkpoint": RNG.normal(size=shape)})
    known = measures_of(request.node.callspec.id).get(task.name, ())
    assert set(result.rows["checkpoint"]) == set(known)
    for name, rows in result.rows["checkpoint"].items():
        value = result.metrics["checkpoint"][name].value
        assert rows.values.sum() / rows.weights.sum() == pytest.approx(value)


def test_every_measure_is_tested():
    assert {task.name for task, _ in CASES} == set(MEASURES)
