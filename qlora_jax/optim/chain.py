"""The optax chain of a run: clip by the global norm, then the optimizer with its schedule."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from qlora_jax.config import OptimArgs
from qlora_jax.optim.schedule import make_schedule


def _adamw(args: OptimArgs, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, args.beta1, args.beta2, args.eps, weight_decay=args.weight_decay)


# Elementwise transforms only: what is paged to the host is updated in pieces.
OPTIMIZERS: dict[str, Callable[[OptimArgs, optax.Schedule], optax.GradientTransformation]] = {"adamw": _adamw}


def _with_standard_promotion(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax computes `decay ** count` with an integer count, which strict dtype promotion refuses."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, params)

    return optax.GradientTransformation(transform.init, update)


def make_elementwise(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """The optimizer without clipping: each element's update depends on that element alone."""
    return _with_standard_promotion(OPTIMIZERS[args.name](args, make_schedule(args, total_steps)))


def make_optimizer(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """Gradients scaled to a global norm of max_grad_norm at most (0: as they are), then AdamW at the schedule's rate.

    Its state has a leaf for each leaf of the pytree that `init` is given, and counts steps; nothing of the base.
    """
    optimizer = make_elementwise(args, total_steps)
    if args.max_grad_norm == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optimizer)
