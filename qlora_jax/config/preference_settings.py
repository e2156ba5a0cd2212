"""Declares the objectives, and the settings of those that learn from preferences."""

import dataclasses
from typing import Literal

from qlora_jax.config.fields import BELOW_HALF, NON_NEGATIVE, POSITIVE, setting
from qlora_jax.config.head_settings import HeadObjective

ObjectiveName = Literal["sft", "dpo", "kto", "orpo", "cpo", "simpo", HeadObjective]
PREFERENCES: tuple[ObjectiveName, ...] = ("dpo", "kto", "orpo", "cpo", "simpo")

# Losses of the objectives that have several; the first is the default.
LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": ("sigmoid", "hinge", "ipo", "robust"),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "kto": ("kto", "apo_zero_unpaired"),
}
# Settings of section `preference` that only some objectives use: setting -> these objectives.
PREFERENCE_USED_BY: dict[str, tuple[str, ...]] = {
    "beta": PREFERENCES,
    "loss_type": tuple(LOSS_TYPES),
    "label_smoothing": ("dpo", "cpo", "simpo"),
    "cpo_alpha": ("cpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
SMOOTHED = ("sigmoid", "robust")  # losses that use label_smoothing


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


def loss_type_of(preference: PreferenceArgs, objective: str) -> str:
    """Returns the loss of an objective that has several."""
    return LOSS_TYPES[objective][0] if preference.loss_type == "auto" else preference.loss_type


def preference_problems(preference: PreferenceArgs, objective: str) -> list[str]:
    """Reports settings that the objective or its loss ignores, and losses that are not the objective's."""
    plain = PreferenceArgs()
    problems = [
        f"preference.{name}: found {getattr(preference, name)!r}, but objective={objective} does not use it. Remove "
        "this setting"
        for name, objectives in PREFERENCE_USED_BY.items()
        if objective not in objectives and getattr(preference, name) != getattr(plain, name)
    ]
    if objective not in LOSS_TYPES:
        return problems
    losses, loss = LOSS_TYPES[objective], loss_type_of(preference, objective)
    if loss not in losses:
        problems.append(
            f"preference.loss_type: found {loss!r} with objective={objective}, expected one of {', '.join(losses)}. "
            "Set one of them"
        )
    elif preference.label_smoothing and objective in PREFERENCE_USED_BY["label_smoothing"] and loss not in SMOOTHED:
        problems.append(
            f"preference.label_smoothing: found {preference.label_smoothing}, but preference.loss_type={loss} does not "
            "use it. Remove this setting"
        )
    return problems
