"""The optax chain of a run: clip by the global norm, then the optimizer with its schedule."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from qlora_jax.config import OptimArgs, plain_name
from qlora_jax.optim.apply_updates import in_f32
from qlora_jax.optim.optimizers_8bit import adamw_8bit, lion_8bit
from qlora_jax.optim.schedule import make_schedule


def _of_optax(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """With state and arithmetic in f32, whatever the parameters are.

    optax computes `decay ** count` with an integer count, which strict dtype promotion refuses.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, in_f32(params))

    return optax.GradientTransformation(lambda params: transform.init(in_f32(params)), update)


def _adamw_32bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    return _of_optax(optax.adamw(rate, args.beta1, args.beta2, args.eps, weight_decay=args.weight_decay))


def _adamw_8bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    return adamw_8bit(rate, args.beta1, args.beta2, args.eps, args.weight_decay)


def _lion_32bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    return _of_optax(optax.lion(rate, args.beta1, args.beta2, weight_decay=args.weight_decay))


def _lion_8bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    return lion_8bit(rate, args.beta1, args.beta2, args.weight_decay)


# Elementwise transforms only: what is paged to the host is updated in pieces. Names without `paged_`, which says where
# the state is and nothing of the update.
OPTIMIZERS: dict[str, Callable[[OptimArgs, optax.Schedule], optax.GradientTransformation]] = {
    "adamw_32bit": _adamw_32bit,
    "adamw_8bit": _adamw_8bit,
    "lion_32bit": _lion_32bit,
    "lion_8bit": _lion_8bit,
}


def make_elementwise(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """The optimizer without clipping: an element's update depends on that element alone, or on those of its block."""
    return OPTIMIZERS[plain_name(args.name)](args, make_schedule(args, total_steps))


def make_optimizer(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """f32 gradients scaled to a global norm of max_grad_norm at most (0: as they are), then the optimizer of that name
    at the schedule's rate. Its updates go through qlora_jax.optim.apply_updates.

    Its state has leaves for each leaf of the pytree that `init` is given, and counts steps; nothing of the base.
    """
    optimizer = make_elementwise(args, total_steps)
    if args.max_grad_norm == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optimizer)
