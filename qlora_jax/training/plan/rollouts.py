"""The memory of sampling replies in the plan of `qlora-jax plan`: by formula, before any data is read."""

from typing import NamedTuple

from qlora_jax.config import Config
from qlora_jax.config.sizes import format_bytes, parse_bytes
from qlora_jax.inference.engine.model_calls import page_bytes, pages_for
from qlora_jax.training.plan.records import KINDS, STEP_ONLY, Requirements


class PlannedRollouts(NamedTuple):
    """The replies of a rollout phase, and the memory of sampling them.

    Fields:
      replies: number of replies, of all prompts.
      cache: bytes of their keys and values on each device.
      total: bytes with the model and its state on each device, without scratch.
    """

    replies: int
    cache: int
    total: int

    def __str__(self) -> str:
        return (
            f"rollouts of {self.replies:,} replies: {format_bytes(self.total)} by formula, of which "
            f"{format_bytes(self.cache)} for keys and values"
        )


def plan_rollouts(config: Config, step: Requirements) -> PlannedRollouts | None:
    """Returns the rollouts of a run whose prompts have data.max_length with one reply; None without rollouts."""
    spec, settings = step.config, config.rollouts
    if spec.objective.row_kind != "prompt":
        return None
    prompts = config.train.micro_batch_size * config.train.accumulation * config.policy.steps_per_generation
    replies = prompts * settings.num_generations
    pages = pages_for(spec.model, [config.data.max_length] * replies, spec.devices)
    cache = min(pages * page_bytes(spec.model, spec.weights.dtype), parse_bytes(settings.cache))
    resident = sum(step.device[kind] for kind in KINDS if kind not in STEP_ONLY)
    return PlannedRollouts(replies, cache, resident + cache)
