"""Declares the objectives, and the settings that only some of them read: sections `preference` and `head`.

An objective is declared here, without JAX, so that settings are checked and explained before it is imported.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from qlora_jax.config.fields import BELOW_HALF, NON_NEGATIVE, NOT_EMPTY, POSITIVE, setting
from qlora_jax.config.registry import Registry

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# text: one text whose answers are learned. pair: a prompt with a chosen and a rejected answer. labelled: a
# prompt, an answer, and whether it is desirable. class: a text and its label. embedding: texts of equal meaning.
# prompt: a prompt, to which the model itself replies.
RowKind = Literal["text", "pair", "labelled", "class", "embedding", "prompt"]
# Values that a row's sequences have besides their ids; see data/class_labels.py.
ValueKind = Literal["none", "desirable", "margin", "class", "classes", "number"]
HEAD_TASKS, LABEL_VALUES = ("labels", "pairs", "embeddings"), ("class", "classes", "number")
SMOOTHED = ("sigmoid", "robust")  # losses that use label_smoothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveDeclaration:
    """The facts about an objective that settings, messages and data read.

    Attributes:
      implementation: a function that returns the objective of a run's settings, or its place as "module:attribute".
      rows: the kind of its rows.
      values: the values that it reads from the rows.
      head: it trains a head on whole sequences, in place of the language-model head.
      labels: the head's outputs have names.
      preference: settings of section `preference` that it reads.
      head_settings: settings of section `head` that it reads.
      policy: it learns from rewards of sampled replies, and reads the section `policy`.
      distillation: it learns the predictions of a teacher, and reads the section `distillation`.
      loss_types: its losses, if it has several; the first is the default.
      per: the loss of a step is a mean over the supervised tokens, or over rows.
      task: the setting of `evaluate` that names the file which its head scores.
      predicts: the column that `predict` adds, beside the probabilities of labels.
      measures: the measures of that task by which `compare` compares runs.
      pooled: the head's result is the pooled state itself.
      problem_type: transformers' name of the meaning of the head's outputs.
      meaning: of these outputs, a sentence for the README of an exported adapter.
    """

    implementation: str | Callable[..., object]
    rows: RowKind
    values: ValueKind = "none"
    head: bool = False
    labels: bool = False
    preference: tuple[str, ...] = ()
    head_settings: tuple[str, ...] = ()
    policy: bool = False
    distillation: bool = False
    loss_types: tuple[str, ...] = ()
    per: Literal["tokens", "rows"] = "rows"
    task: str = ""
    predicts: str = "prediction"
    measures: tuple[str, ...] = ()
    pooled: bool = False
    problem_type: str = ""
    meaning: str = ""

    def __post_init__(self):
        """Raises ValueError for a head whose outputs no task scores."""
        known = self.task in HEAD_TASKS and (self.task != "labels" or self.values in LABEL_VALUES)
        if self.head and not known:
            raise ValueError(
                f"ObjectiveDeclaration: found head=True with task={self.task!r} and values={self.values!r}, expected "
                f"one of {', '.join(HEAD_TASKS)}, and with labels one of {', '.join(LABEL_VALUES)}. Set both"
            )


_MAKE = "qlora_jax.objectives.make_objective:"
OBJECTIVES: Registry[ObjectiveDeclaration] = Registry(
    "qlora_jax.objectives",
    ObjectiveDeclaration,
    {
        "sft": ObjectiveDeclaration(implementation=f"{_MAKE}sft", rows="text", per="tokens"),
        "dpo": ObjectiveDeclaration(
            implementation=f"{_MAKE}dpo",
            rows="pair",
            preference=("beta", "loss_type", "label_smoothing"),
            loss_types=("sigmoid", "hinge", "ipo", "robust"),
        ),
        "kto": ObjectiveDeclaration(
            implementation=f"{_MAKE}kto",
            rows="labelled",
            values="desirable",
            preference=("beta", "loss_type", "desirable_weight", "undesirable_weight"),
            loss_types=("kto", "apo_zero_unpaired"),
        ),
        "orpo": ObjectiveDeclaration(implementation=f"{_MAKE}orpo", rows="pair", preference=("beta",)),
        "cpo": ObjectiveDeclaration(
            implementation=f"{_MAKE}cpo",
            rows="pair",
            preference=("beta", "loss_type", "label_smoothing", "cpo_alpha"),
            loss_types=("sigmoid", "hinge", "ipo"),
        ),
        "simpo": ObjectiveDeclaration(
            implementation=f"{_MAKE}simpo",
            rows="pair",
            preference=("beta", "label_smoothing", "cpo_alpha", "simpo_gamma"),
        ),
        "classification": ObjectiveDeclaration(
            implementation=f"{_MAKE}classification",
            rows="class",
            values="class",
            head=True,
            labels=True,
            head_settings=("labels", "pooling"),
            task="labels",
            measures=("right label",),
            problem_type="single_label_classification",
            meaning="The logits are those of one class per text.",
        ),
        "multi_label": ObjectiveDeclaration(
            implementation=f"{_MAKE}multi_label",
            rows="class",
            values="classes",
            head=True,
            labels=True,
            head_settings=("labels", "pooling"),
            task="labels",
            measures=("right label",),
            problem_type="multi_label_classification",
            meaning="Each logit is that of one label; a label applies where its logit is above 0.",
        ),
        "regression": ObjectiveDeclaration(
            implementation=f"{_MAKE}regression",
            rows="class",
            values="number",
            head=True,
            head_settings=("pooling",),
            task="labels",
            problem_type="regression",
            meaning="The only logit is the predicted number.",
        ),
        "reward": ObjectiveDeclaration(
            implementation=f"{_MAKE}reward",
            rows="pair",
            values="margin",
            head=True,
            head_settings=("center_rewards_coefficient",),
            task="pairs",
            predicts="reward",
            measures=("right by reward", "reward margin"),
            problem_type="regression",
            meaning="The only logit is the reward of a conversation: higher is better.",
        ),
        "embedding": ObjectiveDeclaration(
            implementation=f"{_MAKE}embedding",
            rows="embedding",
            head=True,
            head_settings=("pooling", "temperature"),
            task="embeddings",
            predicts="embedding",
            pooled=True,
        ),
        "grpo": ObjectiveDeclaration(implementation=f"{_MAKE}grpo", rows="prompt", policy=True),
        "distill": ObjectiveDeclaration(implementation=f"{_MAKE}distill", rows="text", per="tokens", distillation=True),
        "gkd": ObjectiveDeclaration(implementation=f"{_MAKE}distill", rows="prompt", per="tokens", distillation=True),
    },
)
ObjectiveName = Annotated[str, OBJECTIVES]


def objectives_with(property: str) -> tuple[str, ...]:
    """Returns the names of the objectives whose declaration has a property, such as "labels"."""
    return tuple(name for name, declared in OBJECTIVES.items() if getattr(declared, property))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceArgs:
    """Learning from preferences, with TRL's names and defaults (docs/preferences.md)."""

    beta: float = setting(
        "dpo, kto: strength of the regularization towards the reference. cpo, simpo: scale of the margin. orpo: weight "
        "of the odds ratio",
        0.1,
        POSITIVE,
    )
    loss_type: Literal["auto", "sigmoid", "hinge", "ipo", "robust", "kto", "apo_zero_unpaired"] = setting(
        "dpo: sigmoid, hinge, ipo or robust. cpo: sigmoid, hinge or ipo. kto: kto or apo_zero_unpaired. auto: the "
        "first of these",
        "auto",
    )
    label_smoothing: float = setting(
        "dpo, cpo and simpo with loss_type sigmoid (conservative DPO), dpo with robust: probability that a preference "
        "is flipped",
        0.0,
        BELOW_HALF,
    )
    cpo_alpha: float | None = setting(
        "cpo, simpo: weight of the mean cross-entropy of the chosen tokens; null: 1 for cpo, 0 for simpo",
        None,
        NON_NEGATIVE,
    )
    simpo_gamma: float = setting("simpo: target of the scaled margin", 0.5, NON_NEGATIVE)
    desirable_weight: float = setting("kto: weight of the losses of desirable rows", 1.0, POSITIVE)
    undesirable_weight: float = setting("kto: weight of the losses of undesirable rows", 1.0, POSITIVE)


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


def loss_type_of(preference: PreferenceArgs, objective: str) -> str:
    """Returns the loss of an objective that has several."""
    return OBJECTIVES[objective].loss_types[0] if preference.loss_type == "auto" else preference.loss_type


def objective_problems(preference: PreferenceArgs, head: HeadArgs, objective: str) -> list[str]:
    """Reports settings of both sections that the objective or its loss ignores, and values that it cannot use."""
    declared = OBJECTIVES[objective]
    problems = unused_settings("preference", preference, declared.preference, objective)
    if declared.loss_types:
        problems += _loss_problems(preference, objective)
    problems += unused_settings("head", head, declared.head_settings, objective)
    labels = head.labels or []
    repeated = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    problems += [f"head.labels: found {label!r} several times, expected unique names. Remove it" for label in repeated]
    if len(labels) == 1 and objective == "classification":
        problems.append(f"head.labels: found only {labels[0]!r}, expected at least 2 labels. Add the others")
    return problems


def unused_settings(section: str, settings: "DataclassInstance", used: tuple[str, ...], objective: str) -> list[str]:
    """Reports settings of a section that differ from their defaults, besides the `used` ones."""
    plain = type(settings)()
    return [
        f"{section}.{field.name}: found {value!r}, but objective={objective} does not use it. Remove this setting"
        for field in dataclasses.fields(settings)
        if field.name not in used and (value := getattr(settings, field.name)) != getattr(plain, field.name)
    ]


def _loss_problems(preference: PreferenceArgs, objective: str) -> list[str]:
    declared, loss = OBJECTIVES[objective], loss_type_of(preference, objective)
    if loss not in declared.loss_types:
        return [
            f"preference.loss_type: found {loss!r} with objective={objective}, expected one of "
            f"{', '.join(declared.loss_types)}. Set one of them"
        ]
    if preference.label_smoothing and "label_smoothing" in declared.preference and loss not in SMOOTHED:
        return [
            f"preference.label_smoothing: found {preference.label_smoothing}, but preference.loss_type={loss} does not "
            "use it. Remove this setting"
        ]
    return []
