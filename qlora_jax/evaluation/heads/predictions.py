"""Predictions of a sequence head for new texts: labels with probabilities, numbers, rewards, or embeddings.

Dimension key: R texts, C outputs, D embed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.data.branches.encoder import make_branch_encoder
from qlora_jax.data.encoder import check_rows
from qlora_jax.data.formats.unlabelled import find_unlabelled_format, use_of
from qlora_jax.data.readers.files import Place, Problem, Row, raise_problems
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.heads.rows import TextIds, check_are_finite, sequence_outputs, texts_of, too_long
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.models.partition import ModelParts
from qlora_jax.objectives.head_objective import TrainedHead

TINY = 1e-12  # the smallest norm by which an embedding is divided, as torch.nn.functional.normalize has it


class Prediction(NamedTuple):
    """The labels of a text.

    Fields:
      labels: the likeliest label; with several labels at once, all whose probability is above a half.
      probabilities: of each label.
    """

    labels: tuple[str, ...]
    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """The likeliest label."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlabelledTexts:
    """Texts to predict for.

    Attributes:
      path, places: the file, and each text's place in it.
      texts: the ids of each text.
    """

    path: str
    places: Sequence[Place]
    texts: Sequence[TextIds]

    def outputs(
        self,
        parts: ModelParts,
        progress: Callable[[int], None] = lambda texts_done: None,
        cache: ResultCache = NO_CACHE,
    ) -> Float64[np.ndarray, "R C"]:
        """Returns the head's outputs; raises ValueError that lists the texts whose outputs are not finite."""
        found_RC = sequence_outputs(parts, self.texts, progress, cache)
        check_are_finite(self.path, self.places, found_RC)
        return found_RC


def encode_texts(
    path: str, rows: Sequence[Row], head: TrainedHead, tokenizer: Tokenizer, max_positions: int
) -> UnlabelledTexts:
    """Returns the ids of each row's text, as training would encode it.

    Raises:
      ValueError: no texts, other columns, or texts that are malformed or too long; the message lists them.
    """
    if not rows:
        raise ValueError(f"{path}: contains no texts (found 0, expected at least one). Give texts")
    row_format = find_unlabelled_format(path, rows, objectives_of(head), head.text_columns)
    check_rows(path, rows, row_format)
    encoder = make_branch_encoder(row_format, tokenizer, use_of(row_format))
    problems: list[Problem] = []
    places, encoded = encoder.begin(rows, problems)()(problems)
    problems += too_long(places, encoded, max_positions)
    raise_problems(path, problems, len(rows))
    return UnlabelledTexts(path=path, places=places, texts=[texts_of(row)[0] for row in encoded])


def objectives_of(head: TrainedHead) -> tuple[str, ...]:
    """Returns the objectives whose rows a head may be given; of one output of unknown meaning, two."""
    return (head.objective,) if head.described or head.outputs != 1 else ("regression", "reward")


def class_predictions(outputs_RC: Float64[np.ndarray, "R C"], head: TrainedHead) -> list[Prediction]:
    """Returns the labels of each text, with their probabilities."""
    several = OBJECTIVES[head.objective].values == "classes"
    probabilities = _sigmoid if several else _softmax
    return [_prediction(head.labels, row_C, several) for row_C in probabilities(outputs_RC)]


def _prediction(labels: Sequence[str], probabilities_C: Float64[np.ndarray, " C"], several: bool) -> Prediction:
    likeliest = int(probabilities_C.argmax())
    chosen = np.flatnonzero(probabilities_C > 0.5).tolist() if several else [likeliest]
    named = dict(zip(labels, probabilities_C.tolist(), strict=True))
    return Prediction(tuple(labels[index] for index in chosen), named)


def _softmax(outputs_RC: Float64[np.ndarray, "R C"]) -> Float64[np.ndarray, "R C"]:
    powers_RC = np.exp(outputs_RC - outputs_RC.max(axis=1, keepdims=True))
    return powers_RC / powers_RC.sum(axis=1, keepdims=True)


def _sigmoid(outputs_RC: Float64[np.ndarray, "R C"]) -> Float64[np.ndarray, "R C"]:
    return np.exp(-np.logaddexp(0.0, -outputs_RC))


def normalized(states_RD: Float64[np.ndarray, "*R D"]) -> Float64[np.ndarray, "*R D"]:
    """Divides states by their Euclidean norm; 0 stays 0."""
    return states_RD / np.maximum(np.linalg.norm(states_RD, axis=-1, keepdims=True), TINY)


def predicted_columns(outputs_RC: Float64[np.ndarray, "R C"], head: TrainedHead) -> list[dict[str, object]]:
    """Returns the columns that the predictions of a head add to each row, as JSON values."""
    declared = OBJECTIVES[head.objective]
    if declared.labels:
        several = declared.values == "classes"
        return [
            {declared.predicts: [*one.labels] if several else one.label, "probabilities": one.probabilities}
            for one in class_predictions(outputs_RC, head)
        ]
    values = normalized(outputs_RC) if declared.pooled else outputs_RC[:, 0]
    return [{declared.predicts: value} for value in values.tolist()]


def added_names(head: TrainedHead) -> set[str]:
    """Returns the names of the columns that the predictions of a head add."""
    return {*predicted_columns(np.zeros((1, max(1, head.outputs))), head)[0]}
