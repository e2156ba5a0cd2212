"""Makes a run's objective from its settings."""

import dataclasses
from collections.abc import Callable
from typing import cast

from qlora_jax.config import Config, ObjectiveName
from qlora_jax.config.preference_settings import loss_type_of
from qlora_jax.io.head_file import TrainedHead, head_of
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.training.objectives.classification import Classification, MultiLabel, Regression
from qlora_jax.training.objectives.cpo import CPO, CPOLoss
from qlora_jax.training.objectives.dpo import DPO, DPOLoss
from qlora_jax.training.objectives.embedding import Embedding
from qlora_jax.training.objectives.head_objective import HeadObjective
from qlora_jax.training.objectives.kto import KTO, KTOLoss
from qlora_jax.training.objectives.objective import Objective
from qlora_jax.training.objectives.orpo import ORPO
from qlora_jax.training.objectives.reward import Reward
from qlora_jax.training.objectives.sft import SUPERVISED

PLACEHOLDER_LABELS = ("0", "1")


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


def _head(config: Config) -> HeadSpec:
    """Returns the head as the settings describe it; without names in them, labels are taken to be two."""
    head = head_of(config.objective, tuple(config.head.labels or PLACEHOLDER_LABELS), config.head.pooling)
    assert head is not None
    return head.spec()


OBJECTIVES: dict[ObjectiveName, Callable[[Config], Objective]] = {
    "sft": lambda config: SUPERVISED,
    "dpo": _dpo,
    "kto": _kto,
    "orpo": lambda config: ORPO(beta=config.preference.beta),
    "cpo": _cpo,
    "simpo": _simpo,
    "classification": lambda config: Classification(head=_head(config)),
    "multi_label": lambda config: MultiLabel(head=_head(config)),
    "regression": lambda config: Regression(head=_head(config)),
    "reward": lambda config: Reward(
        head=_head(config), center_rewards_coefficient=config.head.center_rewards_coefficient
    ),
    "embedding": lambda config: Embedding(head=_head(config), temperature=config.head.temperature),
}


def make_objective(config: Config) -> Objective:
    """Returns the objective of a run with these settings."""
    return OBJECTIVES[config.objective](config)


def fit_to_data(objective: Objective, head: TrainedHead | None, *, sequences: int) -> Objective:
    """Returns the objective for the labels and texts of the data; one without a head is unchanged.

    Args:
      sequences: number of texts in each row, 2 or 3 for `embedding`.
    """
    if head is None or not isinstance(objective, HeadObjective):
        return objective
    fitted = dataclasses.replace(objective, head=head.spec())
    return dataclasses.replace(fitted, sequences_per_row=sequences) if isinstance(fitted, Embedding) else fitted
