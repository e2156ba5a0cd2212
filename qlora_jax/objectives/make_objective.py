"""Makes a run's objective from its settings."""

import dataclasses
from typing import cast

from qlora_jax.config import Config
from qlora_jax.config.objectives import OBJECTIVES, loss_type_of
from qlora_jax.config.registry import load_implementation
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.objectives.classification import Classification, MultiLabel, Regression
from qlora_jax.objectives.cpo import CPO, CPOLoss
from qlora_jax.objectives.distillation import Distillation
from qlora_jax.objectives.dpo import DPO, DPOLoss
from qlora_jax.objectives.embedding import Embedding
from qlora_jax.objectives.head_objective import HeadObjective, TrainedHead, head_of
from qlora_jax.objectives.kto import KTO, KTOLoss
from qlora_jax.objectives.objective import Objective
from qlora_jax.objectives.orpo import ORPO
from qlora_jax.objectives.policy_gradient import PolicyGradient
from qlora_jax.objectives.reward import Reward
from qlora_jax.objectives.sft import SUPERVISED

PLACEHOLDER_LABELS = ("0", "1")


def make_objective(config: Config) -> Objective:
    """Returns the objective of a run with these settings.

    Raises:
      ValueError: its implementation cannot be loaded, or does not return an objective.
    """
    name, made = config.objective, OBJECTIVES[config.objective].implementation
    make = load_implementation("objective", name, made) if isinstance(made, str) else made
    objective = make(config) if callable(make) else make
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective: {name!r} is declared with a function that returns {type(objective).__name__}, which is not an "
            "objective (qlora_jax/objectives/objective.py). Repair or uninstall its package"
        )
    return objective


def sft(config: Config) -> Objective:
    """Returns supervised finetuning."""
    return SUPERVISED


def dpo(config: Config) -> Objective:
    """Returns direct preference optimization."""
    args = config.preference
    loss_type = cast(DPOLoss, loss_type_of(args, "dpo"))
    return DPO(loss_type=loss_type, beta=args.beta, label_smoothing=args.label_smoothing)


def cpo(config: Config) -> Objective:
    """Returns contrastive preference optimization."""
    args = config.preference
    loss_type, alpha = cast(CPOLoss, loss_type_of(args, "cpo")), 1.0 if args.cpo_alpha is None else args.cpo_alpha
    return CPO(loss_type=loss_type, beta=args.beta, label_smoothing=args.label_smoothing, alpha=alpha)


def simpo(config: Config) -> Objective:
    """Returns simple preference optimization."""
    args = config.preference
    alpha = 0.0 if args.cpo_alpha is None else args.cpo_alpha
    smoothing = {"label_smoothing": args.label_smoothing}
    return CPO(loss_type="simpo", beta=args.beta, alpha=alpha, gamma=args.simpo_gamma, **smoothing)


def kto(config: Config) -> Objective:
    """Returns Kahneman-Tversky optimization."""
    args = config.preference
    return KTO(
        loss_type=cast(KTOLoss, loss_type_of(args, "kto")),
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
    )


def orpo(config: Config) -> Objective:
    """Returns odds ratio preference optimization."""
    return ORPO(beta=config.preference.beta)


def classification(config: Config) -> Objective:
    """Returns the choice of one label."""
    return Classification(head=_head(config))


def multi_label(config: Config) -> Objective:
    """Returns the choice of any labels."""
    return MultiLabel(head=_head(config))


def regression(config: Config) -> Objective:
    """Returns the prediction of a number."""
    return Regression(head=_head(config))


def reward(config: Config) -> Objective:
    """Returns the learning of rewards from pairs."""
    return Reward(head=_head(config), center_rewards_coefficient=config.head.center_rewards_coefficient)


def embedding(config: Config) -> Objective:
    """Returns the learning of embeddings from texts of equal meaning."""
    return Embedding(head=_head(config), temperature=config.head.temperature)


def grpo(config: Config) -> Objective:
    """Returns the policy gradient from rewards of sampled replies."""
    args = config.policy
    return PolicyGradient(
        sequences_per_row=config.rollouts.num_generations,
        loss="cispo" if args.loss_type == "cispo" else "clip",
        level=args.importance_sampling_level,
        epsilon=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        beta=args.beta,
        bias_corrected_kl=args.use_bias_correction_kl,
        temperature=config.rollouts.temperature,
        correction=args.importance_correction,
        correction_max=args.correction_max,
        stored_old=args.num_iterations > 1 or args.steps_per_generation > 1,
    )


def distill(config: Config) -> Objective:
    """Returns the learning of a teacher's predictions, for the data's tokens or for sampled replies."""
    args, rows = config.distillation, OBJECTIVES[config.objective].rows
    return Distillation(
        row_kind=rows,
        sequences_per_row=config.rollouts.num_generations if rows == "prompt" else 0,
        beta=args.beta,
        temperature=args.temperature,
        count_of_tokens=args.loss_top_k,
        has_tail=args.loss_add_tail,
        sampler_temperature=config.rollouts.temperature,
    )


def _head(config: Config) -> HeadSpec:
    """Returns the head as the settings describe it; without names in them, labels are taken to be two."""
    head = head_of(config.objective, tuple(config.head.labels or PLACEHOLDER_LABELS), config.head.pooling)
    assert head is not None
    return head.spec()


def fit_to_data(objective: Objective, head: TrainedHead | None, *, sequences: int) -> Objective:
    """Returns the objective for the labels and texts of the data; one without a head is unchanged.

    Args:
      sequences: number of texts in each row, 2 or 3 for `embedding`.
    """
    if head is None or not isinstance(objective, HeadObjective):
        return objective
    fitted = dataclasses.replace(objective, head=head.spec())
    return dataclasses.replace(fitted, sequences_per_row=sequences) if isinstance(fitted, Embedding) else fitted
