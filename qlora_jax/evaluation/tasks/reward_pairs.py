"""The task `pairs` for a reward model: how often its reward of the chosen answer is higher than of the rejected one.

Dimension key: P pairs; 2 answers, the chosen one first.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64

from qlora_jax.evaluation.heads.rows import HeadRows, head_of_task, lower_outputs, read_head_rows
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, RowValues
from qlora_jax.measures.statistics import bootstrap, mean_change_interval, wilson_interval
from qlora_jax.models.partition import ModelParts
from qlora_jax.objectives.head_objective import TrainedHead

OF_LIKELIHOOD = ("by", "pair_beta")  # settings of scoring without a head
RIGHT, MARGIN = "right by reward", "reward margin"

Rewards = Float64[np.ndarray, "P 2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardPairsTask:
    """Accuracy and margin of rewards; see evaluation/task.py for the members.

    Attributes:
      rows: the chosen and the rejected answer of each pair, after their prompt.
    """

    title: str
    rows: HeadRows
    name: str = "pairs"

    @property
    def size(self) -> int:
        """The number of answers."""
        return len(self.rows.texts)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each answer's ids."""
        return [[ids] for ids in self.rows.texts]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> Rewards:
        """Returns the rewards of each pair's answers; raises ValueError if some are not finite."""
        return self.rows.outputs(parts, progress, cache)[..., 0]

    def metrics(self, scores: Rewards) -> list[Metric]:
        """Accuracy, in which a tie counts as half; margin; and the number of ties."""
        return reward_metrics(scores)

    def compare(self, before: Rewards, after: Rewards) -> list[Comparison]:
        """The change of the accuracy, with an interval over pairs."""
        old, new = _right(before), _right(after)
        return [Comparison(RIGHT, "share", float((new - old).mean()), mean_change_interval(new - old))]

    def row_values(self, scores: Rewards) -> dict[str, RowValues]:
        """The pairs' parts of the measures in `MEASURES`."""
        one_P = np.ones(len(scores))
        return {RIGHT: RowValues(_right(scores), one_P), MARGIN: RowValues(_margins(scores), one_P)}

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the program of the largest batch."""
        return lower_outputs(parts, self.rows.texts)


def reward_metrics(rewards_P2: Rewards) -> list[Metric]:
    """Returns the accuracy and the mean margin of rewards, with 95 % intervals, and the number of ties."""
    right_P, margin_P = _right(rewards_P2), _margins(rewards_P2)
    return [
        Metric(RIGHT, "share", float(right_P.mean()), wilson_interval(float(right_P.sum()), len(right_P))),
        Metric(MARGIN, "number", float(margin_P.mean()), bootstrap(margin_P, np.ones(len(margin_P)))),
        Metric("ties (count as half)", "count", int((margin_P == 0).sum())),
    ]


def _margins(rewards_P2: Rewards) -> Float64[np.ndarray, " P"]:
    return rewards_P2[:, 0] - rewards_P2[:, 1]


def _right(rewards_P2: Rewards) -> Float64[np.ndarray, " P"]:
    return (np.sign(_margins(rewards_P2)) + 1) / 2


def as_reward(head: TrainedHead | None) -> TrainedHead | None:
    """Returns the head; one of another library with one output, whose meaning is unknown, as that of rewards."""
    if head is None or head.described or head.outputs != 1:
        return head
    return dataclasses.replace(head, objective="reward")


def build(settings: TaskArgs, context: TaskContext) -> RewardPairsTask:
    """Builds the task that the settings describe.

    Raises:
      ValueError: the head's outputs are not rewards, or a setting that rewards do not use.
    """
    assert settings.pairs is not None
    context = dataclasses.replace(context, head=as_reward(context.head))
    head_of_task(context, "pairs", ("reward",))
    if given := [name for name in OF_LIKELIHOOD if getattr(settings, name) != getattr(TaskArgs(), name)]:
        raise ValueError(f"{', '.join(given)}: a reward model's pairs do not use it. Remove it")
    rows = read_head_rows(settings.pairs, settings, context)
    return RewardPairsTask(title=f"{settings.pairs}: {len(rows.places)} pairs, by the run's rewards", rows=rows)
