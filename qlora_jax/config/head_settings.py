"""Declares the settings of heads on whole sequences: classification, regression, rewards, embeddings."""

import dataclasses
from typing import Literal, get_args

from qlora_jax.config.fields import NON_NEGATIVE, NOT_EMPTY, POSITIVE, setting

CLASSES = ("classification", "multi_label")  # objectives whose outputs have names
HeadObjective = Literal["classification", "multi_label", "regression", "reward", "embedding"]
HEADS: tuple[HeadObjective, ...] = get_args(HeadObjective)
# Objective -> the setting of `evaluate` that names the file which its head scores.
HEAD_TASKS: dict[HeadObjective, str] = {
    "classification": "labels",
    "multi_label": "labels",
    "regression": "labels",
    "reward": "pairs",
    "embedding": "embeddings",
}
# Settings of section `head` that only some objectives use: setting -> these objectives.
HEAD_USED_BY: dict[str, tuple[str, ...]] = {
    "labels": CLASSES,
    "pooling": tuple(name for name in HEADS if name != "reward"),
    "temperature": ("embedding",),
    "center_rewards_coefficient": ("reward",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadArgs:
    """The head on whole sequences, which trains next to the adapter (docs/heads.md)."""

    labels: list[str] | None = setting(
        "classification, multi_label: names of the labels, in the order of the outputs. null: those of the training "
        "data, sorted",
        None,
        NOT_EMPTY,
    )
    pooling: Literal["last", "mean"] = setting(
        "hidden state of a sequence. last: that of its last token; mean: the mean over its tokens, which PEFT cannot "
        "export for classification and regression",
        "last",
    )
    temperature: float = setting(
        "embedding: cosines are divided by it, the inverse of sentence-transformers' scale", 0.05, POSITIVE
    )
    center_rewards_coefficient: float = setting(
        "reward: weight of the mean square of the sum of both rewards, which keeps them near 0, such as 0.01",
        0.0,
        NON_NEGATIVE,
    )


def head_problems(head: HeadArgs, objective: str) -> list[str]:
    """Reports settings that the objective ignores, and labels that occur twice."""
    plain = HeadArgs()
    problems = [
        f"head.{name}: found {getattr(head, name)!r}, but objective={objective} does not use it. Remove this setting"
        for name, objectives in HEAD_USED_BY.items()
        if objective not in objectives and getattr(head, name) != getattr(plain, name)
    ]
    labels = head.labels or []
    repeated = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    problems += [f"head.labels: found {label!r} several times, expected unique names. Remove it" for label in repeated]
    if len(labels) == 1 and objective == "classification":
        problems.append(f"head.labels: found only {labels[0]!r}, expected at least 2 labels. Add the others")
    return problems
