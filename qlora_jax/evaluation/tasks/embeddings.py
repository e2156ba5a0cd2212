"""The task `embeddings`: texts that mean the same, or pairs of texts with a score, compared by cosine similarity.

Dimension key: R rows, K texts of a row, D embed.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64

from qlora_jax.data.readers.files import Row
from qlora_jax.evaluation.heads.metrics import spearman_metric
from qlora_jax.evaluation.heads.predictions import normalized
from qlora_jax.evaluation.heads.rows import HeadRows, encode_head_rows, head_of_task, lower_outputs
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import read_each, read_task_rows, values_of, wrong_value
from qlora_jax.inference.lowering import LoweredProgram
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.measures.metrics import Comparison, Metric, share, share_change
from qlora_jax.measures.statistics import mean_interval
from qlora_jax.models.partition import ModelParts

SCORED = {"sentence1": "anchor", "sentence2": "positive"}  # columns of pairs with a score
NEAREST = "positive is nearest"
ANCHORS = 512  # compared with all candidates at once, which bounds memory

States = Float64[np.ndarray, "R K D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingsTask:
    """Retrieval among all texts of the file, or the rank correlation with scores; see `Task` for the members.

    Attributes:
      rows: the texts, equally many of each row.
      scores: the score of each row's two texts; None: rows are anchor, positive and perhaps a negative.
    """

    title: str
    rows: HeadRows
    scores: Float64[np.ndarray, " R"] | None
    name: str = "embeddings"

    @property
    def size(self) -> int:
        """The number of texts."""
        return len(self.rows.texts)

    @property
    def inputs(self) -> Sequence[Sequence[object]]:
        """Each text's ids, and all scores."""
        return [*([ids] for ids in self.rows.texts), [self.scores]]

    def score(self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache) -> States:
        """Returns the normalized hidden states of each row's texts; raises ValueError if some are not finite."""
        return normalized(self.rows.outputs(parts, progress, cache))

    def metrics(self, scores: States) -> list[Metric]:
        """Spearman's correlation with the scores; without scores, retrieval among all texts but the anchors."""
        if self.scores is not None:
            return [spearman_metric((scores[:, 0] * scores[:, 1]).sum(axis=1), self.scores)]
        return retrieval_metrics(scores)

    def compare(self, before: States, after: States) -> list[Comparison]:
        """The change of retrieval accuracy; none with scores."""
        return [] if self.scores is not None else [share_change(NEAREST, _ranks(before) == 1, _ranks(after) == 1)]

    def lower(self, parts: ModelParts) -> Iterator[LoweredProgram]:
        """Lowers the program of the largest batch."""
        return lower_outputs(parts, self.rows.texts)


def retrieval_metrics(states_RKD: States) -> list[Metric]:
    """Returns how often an anchor's positive is nearest to it, and the mean reciprocal rank."""
    reciprocal_R = 1 / _ranks(normalized(states_RKD))
    mean = Metric("mean reciprocal rank", "number", float(reciprocal_R.mean()), mean_interval(reciprocal_R))
    return [share(NEAREST, reciprocal_R == 1), mean]


def _ranks(states_RKD: States) -> Float64[np.ndarray, " R"]:
    """Returns the rank of each anchor's positive among all other rows' positives and all negatives; ties count against.

    Texts equal to the positive are as near, so duplicates in the file lower the figure.
    """
    rows, width = len(states_RKD), states_RKD.shape[2]
    candidates_CD = states_RKD[:, 1:].transpose(1, 0, 2).reshape(-1, width)  # positives first
    ranks = []
    for start in range(0, rows, ANCHORS):
        similar_BC = states_RKD[start : start + ANCHORS, 0] @ candidates_CD.T
        own_B = similar_BC[np.arange(len(similar_BC)), start + np.arange(len(similar_BC))]
        ranks.append((similar_BC >= own_B[:, None]).sum(axis=1))
    return np.concatenate(ranks).astype(np.float64)


def build(settings: TaskArgs, context: TaskContext) -> EmbeddingsTask:
    """Builds the task that the settings describe.

    Raises:
      ValueError: the model was not trained for embeddings, or rows that cannot be scored; the message lists them.
    """
    path = settings.embeddings
    assert path is not None
    head_of_task(context, "embeddings", ("embedding",))
    rows = read_task_rows(path, "embeddings", settings.file_columns, settings.max_rows, KNOWN_COLUMNS)
    scores = None
    if any("label" in row.data for row in rows):
        scores = np.array(read_each(path, rows, _score))
        rows = [Row(row.place, {SCORED.get(name, name): text for name, text in row.data.items()}) for row in rows]
    encoded = encode_head_rows(path, rows, settings.file_columns, context)
    kind = "cosine similarity and scores" if scores is not None else "retrieval by cosine similarity"
    return EmbeddingsTask(title=f"{path}: {len(rows)} rows, {kind}", rows=encoded, scores=scores)


KNOWN_COLUMNS = ("anchor", "positive", "negative", "sentence1", "sentence2", "label")


def _score(row: Row) -> float:
    value = values_of(row.data, ["label", *SCORED])[0]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong_value("label", value, "a number")
    try:
        return float(value)
    except ValueError:
        raise wrong_value("label", value, "a number") from None
