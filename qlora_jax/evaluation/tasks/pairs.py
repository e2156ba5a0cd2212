"""The task `pairs`: preference pairs. A model should find the chosen answer likelier than the rejected one.

A run is also compared with its reference, the model before its training: the reward of an answer is
pair_beta * (log p - log p of the reference), as in DPO, whatever the run's own objective.

Dimension key: P pairs; 2 answers, the chosen one first.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from qlora_jax.data.branch_tree import whole_texts
from qlora_jax.data.branches.encoder import make_branch_encoder
from qlora_jax.data.encoder import check_rows
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import OPTIONAL_COLUMNS
from qlora_jax.data.readers.files import Problem, raise_problems
from qlora_jax.data.row_kinds import row_use
from qlora_jax.evaluation.divergence import compare_rows
from qlora_jax.evaluation.loglikelihood import ScoredIds, lower_scoring, score_rows
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import MEASURES, ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import check_lengths, groups_by, read_task_rows
from qlora_jax.evaluation.tasks import reward_pairs
from qlora_jax.evaluation.tasks.reward_pairs import RewardPairsTask
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, MetricKind, RowValues
from qlora_jax.measures.statistics import bootstrap, mean_change_interval, paired_bootstrap, wilson_interval
from qlora_jax.models.partition import ModelParts

OBJECTIVE = "dpo"  # its rows are pairs
RIGHT_BY_REWARD, RIGHT_BY_LIKELIHOOD, MARGIN = "right by reward", "right by likelihood", "reward margin"
LOG_RATIO = "log ratio to the reference per token"
DIVERGENCES = tuple(f"KL to the reference per token, {answer}" for answer in ("chosen", "rejected"))
LONGER = "chosen is longer"
KINDS: dict[str, MetricKind] = {
    RIGHT_BY_REWARD: "share",
    MARGIN: "number",
    LOG_RATIO: "number",
    **dict.fromkeys(DIVERGENCES, "number"),
    RIGHT_BY_LIKELIHOOD: "share",
    f"{RIGHT_BY_LIKELIHOOD} per token": "share",
    "loss per token, chosen": "number",
    "loss per token, rejected": "number",
    LONGER: "share",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairScores:
    """Scores of both answers of each pair.

    Fields:
      nll_P2: the sum of -log p over the tokens of an answer.
      reference_P2: the same under the reference; None for a model without one.
      divergence_P2: the sum of KL(model || reference) over the tokens of an answer; None without a reference.
    """

    nll_P2: Float64[np.ndarray, "P 2"]
    tokens_P2: Int64[np.ndarray, "P 2"]
    reference_P2: Float64[np.ndarray, "P 2"] | None = None
    divergence_P2: Float64[np.ndarray, "P 2"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsTask:
    """Accuracy, margin and log ratio of preference pairs; see evaluation/task.py for the members.

    Attributes:
      sequences: the chosen and the rejected answer of each pair in turn, after their prompt.
      beta: factor of rewards.
      groups: the indices of the pairs of each group, by its description; their accuracies are also reported.
    """

    title: str
    sequences: Sequence[ScoredIds]
    beta: float
    groups: Mapping[str, Int64[np.ndarray, "_"]] = dataclasses.field(default_factory=dict)
    name: str = "pairs"

    @property
    def size(self) -> int:
        """The number of answers."""
        return len(self.sequences)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each answer's ids, and the mask of the scored ones."""
        return self.sequences

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> PairScores:
        """Scores one model on each answer."""
        scores = score_rows(parts, self.sequences, progress, cache)
        return PairScores(nll_P2=scores.nll.reshape(-1, 2), tokens_P2=scores.tokens.reshape(-1, 2))

    def score_with_reference(
        self, parts: ModelParts, reference: ModelParts, progress: ProgressCallback, cache: ResultCache
    ) -> PairScores:
        """Scores a run and the model before its training on each answer, and the divergence of the run from it."""
        found = compare_rows(parts, reference, self.sequences, progress, cache)
        nll_P2, reference_P2, divergence_P2 = (
            sums.reshape(-1, 2) for sums in (found.nll, found.reference_nll, found.divergence)
        )
        return PairScores(
            nll_P2=nll_P2,
            tokens_P2=np.array([scored[1:].sum() for _, scored in self.sequences]).reshape(-1, 2),
            reference_P2=reference_P2,
            divergence_P2=divergence_P2,
        )

    def metrics(self, scores: PairScores) -> list[Metric]:
        """Accuracies, margin, log ratio and losses; the accuracies of each group; and the number of ties."""
        found = [_metric(name, one) for name, one in self.pair_values(scores).items()]
        for group, pairs in self.groups.items():
            found += [
                _metric(name, RowValues(one.values[pairs], one.weights[pairs]))._replace(name=f"{name}, {group}")
                for name, one in self.pair_values(scores).items()
                if name.startswith("right")
            ]
        ties = int((scores.nll_P2[:, 0] == scores.nll_P2[:, 1]).sum())
        return [*found, Metric("ties by likelihood (count as half)", "count", ties)]

    def compare(self, before: PairScores, after: PairScores) -> list[Comparison]:
        """The changes of all measures that both models have, with intervals over pairs."""
        old, new = self.pair_values(before), self.pair_values(after)
        return [
            Comparison(name, KINDS[name], _mean(new[name]) - _mean(old[name]), _change(name, old[name], new[name]))
            for name in KINDS
            if name in old and name in new and name != LONGER
        ]

    def row_values(self, scores: PairScores) -> dict[str, RowValues]:
        """The pairs' parts of the measures in `MEASURES`."""
        return {name: one for name, one in self.pair_values(scores).items() if name in MEASURES[self.name]}

    def pair_values(self, scores: PairScores) -> dict[str, RowValues]:
        """Returns the pairs' parts of all metrics. A tie counts as half right."""
        one_P, tokens_P2 = np.ones(len(scores.nll_P2)), scores.tokens_P2.astype(np.float64)
        found: dict[str, RowValues] = {}
        if scores.reference_P2 is not None:
            ratio_P2 = scores.reference_P2 - scores.nll_P2
            margin_P = self.beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
            found = {
                RIGHT_BY_REWARD: RowValues(_right(margin_P), one_P),
                MARGIN: RowValues(margin_P, one_P),
                LOG_RATIO: RowValues(ratio_P2.sum(axis=1), tokens_P2.sum(axis=1)),
            }
        if scores.divergence_P2 is not None:
            for name, divergence_P, tokens_P in zip(DIVERGENCES, scores.divergence_P2.T, tokens_P2.T, strict=True):
                found[name] = RowValues(divergence_P, tokens_P)
        mean_P2 = scores.nll_P2 / tokens_P2
        return found | {
            RIGHT_BY_LIKELIHOOD: RowValues(_right(scores.nll_P2[:, 1] - scores.nll_P2[:, 0]), one_P),
            f"{RIGHT_BY_LIKELIHOOD} per token": RowValues(_right(mean_P2[:, 1] - mean_P2[:, 0]), one_P),
            "loss per token, chosen": RowValues(scores.nll_P2[:, 0], tokens_P2[:, 0]),
            "loss per token, rejected": RowValues(scores.nll_P2[:, 1], tokens_P2[:, 1]),
            LONGER: RowValues(_right(tokens_P2[:, 0] - tokens_P2[:, 1]), one_P),
        }

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the programs of the largest batches."""
        return lower_scoring(parts, self.sequences)


def _right(differences: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, " P"]:
    """Returns 1 where the difference is positive, 0 where it is negative, and a half where it is 0."""
    return (1 + np.sign(differences)) / 2


def _mean(values: RowValues) -> float:
    return float(values.values.sum() / values.weights.sum())


def _metric(name: str, values: RowValues) -> Metric:
    if KINDS[name] == "share":
        interval = wilson_interval(float(values.values.sum()), len(values.values))
    else:
        interval = bootstrap(values.values, values.weights)
    return Metric(name, KINDS[name], _mean(values), interval)


def _change(name: str, before: RowValues, after: RowValues) -> tuple[float, float]:
    if KINDS[name] == "share":
        return mean_change_interval(after.values - before.values)
    return paired_bootstrap(before.values, after.values, after.weights)


def build(settings: TaskArgs, context: TaskContext) -> PairsTask | RewardPairsTask:
    """Reads preference pairs in a format of training data; the tokens that training would learn are scored.

    A model with a sequence head is scored by its rewards.

    Raises:
      ValueError: rows that are not pairs, or are too long; the message lists them.
    """
    if context.head is not None:
        return reward_pairs.build(settings, context)
    assert settings.pairs is not None
    path, names = settings.pairs, settings.file_columns
    rows = read_task_rows(path, "pairs", names, settings.max_rows, OPTIONAL_COLUMNS)
    row_format = detect_format(path, rows, names=names, setting="file_columns", objective=OBJECTIVE)
    check_rows(path, rows, row_format)
    problems: list[Problem] = []
    encode = make_branch_encoder(row_format, context.tokenizer, row_use(OBJECTIVE)).begin(rows, problems)
    _, encoded = encode()(problems)
    raise_problems(path, problems, len(rows))
    pairs = [whole_texts(row.ids, row.supervised, row.branches) for row in encoded]
    check_lengths(path, rows, pairs, context.max_positions)
    return PairsTask(
        title=f"{path}: {len(rows)} pairs, rewards with pair_beta {settings.pair_beta:g}",
        sequences=[sequence for pair in pairs for sequence in pair],
        beta=settings.pair_beta,
        groups={} if settings.by is None else groups_by(path, rows, settings.by),
    )
