"""Learning-rate schedules in the definitions of transformers.

W warm-up steps, S steps in total, `step` counted from 0. Warm-up rises as step / W, so step 0 changes nothing; with
`warmup_start: first` it rises as (step + 1) / W. The first step after it has the peak rate.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qlora_jax.config import OptimArgs

Shape = Callable[[jax.Array], jax.Array]


def _constant(progress: jax.Array) -> jax.Array:
    return jnp.ones_like(progress)


def _linear(progress: jax.Array) -> jax.Array:
    return 1.0 - progress


def _cosine(progress: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


# progress (step - W) / (S - W) in [0, 1] -> factor of the peak learning rate.
SHAPES: dict[str, Shape] = {"constant": _constant, "linear": _linear, "cosine": _cosine}
_FIRST = {"zero": 0, "first": 1}  # the numerator of step 0 during warm-up


def warmup_steps(args: OptimArgs, total_steps: int) -> int:
    """Returns W = ceil(warmup_ratio * S), as in transformers."""
    return math.ceil(args.warmup_ratio * total_steps)


def make_schedule(args: OptimArgs, total_steps: int) -> optax.Schedule:
    """Returns `schedule(step) -> learning rate`, f32; the end value holds past S.

    Unlike transformers' schedule of that name, `constant` warms up; warmup_ratio 0 turns that off.

    Raises:
      ValueError: `total_steps` is less than 1.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: found {total_steps}, expected 1 or more.")
    warmup = warmup_steps(args, total_steps)
    shape, first = SHAPES[args.schedule], _FIRST[args.warmup_start]

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        factor = jnp.where(step < warmup, (step + first) / max(1, warmup), shape(progress))
        return args.learning_rate * factor

    return schedule
