"""Makes a run's objective from its settings."""

import dataclasses
from collections.abc import Callable
from typing import cast

from qlora_jax.config import Config, ObjectiveName
from qlora_jax.config.preference_settings import loss_type_of
from qlora_jax.training.objectives.classification import Classification, MultiLabel, Regression
from qlora_jax.training.objectives.cpo import CPO, CPOLoss
from qlora_jax.training.objectives.dpo import DPO, DPOLoss
from qlora_jax.training.objectives.embedding import Embedding
from qlora_jax.training.objectives.kto import KTO, KTOLoss
from qlora_jax.training.objectives.objective import Objective
from qlora_jax.training.objectives.orpo import ORPO
from qlora_jax.training.objectives.reward import Reward
from qlora_jax.training.objectives.sft import SUPERVISED


def _dpo(config: Config) -> Objective:
    args = config.preference
    loss_type = cast(DPOLoss, loss_type_of(args, "dpo"))
    return DPO(loss_type=loss_type, beta=args.beta, label_smoothing=args.label_smoothing)


def _cpo(config: Config) -> Objective:
    args = config.preference
    loss_type, alpha = cast(CPOLoss, loss_type_of(args, "cpo")), 1.0 if args.cpo_alpha is None else args.cpo_alpha
    return CPO(loss_type=loss_type, beta=args.beta, label_smoothing=args.label_smoothing, alpha=alpha)


def _simpo(config: Config) -> Objective:
    args = config.preference
    alpha = 0.0 if args.cpo_alpha is None else args.cpo_alpha
    smoothing = {"label_smoothing": args.label_smoothing}
    return CPO(loss_type="simpo", beta=args.beta, alpha=alpha, gamma=args.simpo_gamma, **smoothing)


def _kto(config: Config) -> Objective:
    args = config.preference
    return KTO(
        loss_type=cast(KTOLoss, loss_type_of(args, "kto")),
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
    )


OBJECTIVES: dict[ObjectiveName, Callable[[Config], Objective]] = {
    "sft": lambda config: SUPERVISED,
    "dpo": _dpo,
    "kto": _kto,
    "orpo": lambda config: ORPO(beta=config.preference.beta),
    "cpo": _cpo,
    "simpo": _simpo,
    "classification": lambda config: Classification(),
    "multi_label": lambda config: MultiLabel(),
    "regression": lambda config: Regression(),
    "reward": lambda config: Reward(center_rewards_coefficient=config.head.center_rewards_coefficient),
    "embedding": lambda config: Embedding(temperature=config.head.temperature),
}


def make_objective(config: Config) -> Objective:
    """Returns the objective of a run with these settings."""
    return OBJECTIVES[config.objective](config)


def fit_to_data(objective: Objective, *, labels: int, sequences: int) -> Objective:
    """Returns the objective for rows with this many labels and texts.

    Args:
      labels: number of labels of `multi_label`.
      sequences: number of texts in each row of `embedding`, 2 or 3.
    """
    if isinstance(objective, MultiLabel):
        return dataclasses.replace(objective, labels=labels)
    if isinstance(objective, Embedding):
        return dataclasses.replace(objective, sequences_per_row=sequences)
    return objective
