"""Makes a run's objective from its settings."""

from collections.abc import Callable
from typing import cast

from qlora_jax.config import Config, ObjectiveName
from qlora_jax.config.preference_settings import loss_type_of
from qlora_jax.training.objectives.cpo import CPO, CPOLoss
from qlora_jax.training.objectives.dpo import DPO, DPOLoss
from qlora_jax.training.objectives.kto import KTO, KTOLoss
from qlora_jax.training.objectives.objective import Objective
from qlora_jax.training.objectives.orpo import ORPO
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
}


def make_objective(config: Config) -> Objective:
    """Returns the objective of a run with these settings."""
    return OBJECTIVES[config.objective](config)
