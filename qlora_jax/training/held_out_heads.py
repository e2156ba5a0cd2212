"""Held-out metrics of sequence heads, by the functions of `evaluate`.

Dimension key: R held-out rows, S sequences of a row, C outputs or embedding width.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qlora_jax.data.readers.files import Place
from qlora_jax.evaluation.heads.rows import check_are_finite
from qlora_jax.evaluation.tasks.embeddings import retrieval_metrics
from qlora_jax.evaluation.tasks.head_labels import LABELLED, head_label_metrics
from qlora_jax.evaluation.tasks.reward_pairs import reward_metrics
from qlora_jax.measures.metrics import Metric
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.objectives.objective import LABELS
from qlora_jax.training.metrics.eval_metrics import flatten_metrics


def held_out_head_metrics(
    head: TrainedHead, outputs_RSC: np.ndarray, arrays: Mapping[str, np.ndarray], numbers: Sequence[int]
) -> dict[str, float]:
    """Returns the entries of an evaluation's record: those of `labels`, `pairs` or `embeddings`, with intervals.

    Args:
      outputs_RSC: the head's outputs for the sequences of each row, or their pooled states.
      arrays: the rows' values by name, [R, S] or [R, S, C].
      numbers: of the rows, from 0, for messages.

    Raises:
      ValueError: outputs are not finite; the message lists the rows.
    """
    outputs_RSC = np.asarray(outputs_RSC, np.float64)
    check_are_finite("held-out rows", [Place(number + 1, number) for number in numbers], outputs_RSC)
    task, metrics = _metrics(head, outputs_RSC, arrays)
    return flatten_metrics(task, metrics)


def _metrics(head: TrainedHead, outputs_RSC: np.ndarray, arrays: Mapping[str, np.ndarray]) -> tuple[str, list[Metric]]:
    if head.objective in LABELLED:
        labels = np.asarray(arrays[LABELS], np.float64).reshape(len(outputs_RSC), -1)
        return "labels", head_label_metrics(head, outputs_RSC[:, 0], labels)
    if head.objective == "reward":
        return "pairs", reward_metrics(outputs_RSC[..., 0])
    return "embeddings", retrieval_metrics(outputs_RSC)
