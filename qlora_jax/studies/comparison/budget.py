"""Equal budgets: ranks that give equally many trainable parameters, and steps that take equally long."""

import dataclasses
import math

from qlora_jax.config import Config
from qlora_jax.config.methods import uses
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.plan.target import model_features, planned_weights

MAX_RANK = 1 << 16


def trainable_parameters(config: Config) -> int:
    """Returns the number of trainable parameters of a run, from its configuration and the model's.

    The model may be one of models/catalog.py by name, or any that a run can train.

    Raises:
      ValueError: the model cannot be read, or the settings do not fit it.
    """
    model, features = config.model, model_features(config.model.path)
    step = StepShape(
        model=features,
        weights=planned_weights(model, features, "cpu"),  # the number does not depend on the device
        lora=config.lora,
        batch=(1, 1, 1),
        remat=config.train.remat,
        new_tokens=len(model.new_tokens) + len(model.new_special_tokens),
    )
    return sum(math.prod(leaf.shape) for leaf in step.trees.adapters(None))


def matching_rank(config: Config, target: int, tolerance: float) -> int | None:
    """Returns the rank that gives the number of trainable parameters nearest to `target`.

    Returns None if the method has no rank and its number is within `tolerance` already.

    Args:
      tolerance: the largest relative difference.

    Raises:
      ValueError: no rank is within `tolerance`; names the nearest.
    """
    if not uses(config.lora.method, "rank"):
        _check_near({"this method": trainable_parameters(config)}, target, tolerance)
        return None
    above = 1
    while above < MAX_RANK and trainable_parameters(_with_rank(config, above)) < target:
        above *= 2
    low, high = 1, above
    while low < high:  # the smallest rank that reaches the target
        middle = (low + high) // 2
        low, high = (low, middle) if trainable_parameters(_with_rank(config, middle)) >= target else (middle + 1, high)
    counts = {rank: trainable_parameters(_with_rank(config, rank)) for rank in (max(low - 1, 1), low)}
    _check_near({f"rank {rank}": count for rank, count in counts.items()}, target, tolerance)
    return min(counts, key=lambda rank: abs(counts[rank] - target))


def _with_rank(config: Config, rank: int) -> Config:
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=rank))


def _check_near(counts: dict[str, int], target: int, tolerance: float) -> None:
    if all(abs(count - target) > tolerance * target for count in counts.values()):
        found = ", ".join(f"{name} has {count:,}" for name, count in counts.items())
        raise ValueError(
            f"budget.trainable_parameters: found {target:,}, and {found}, further off than budget.tolerance "
            f"{tolerance:g}. Set one of these numbers, or a larger tolerance"
        )


def steps_within(seconds: float, per_step: float) -> int:
    """Returns how many steps fit into a time.

    Raises:
      ValueError: not a single one does.
    """
    if per_step > seconds:
        raise ValueError(f"budget.seconds: found {seconds:g}, but one step takes {per_step:.3g} s. Set more seconds")
    return int(seconds / per_step)
