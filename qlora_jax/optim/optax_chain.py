"""The optax chain of a run: clip by the global norm, then the optimizer with its schedule."""

from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree

from qlora_jax.config import OptimArgs, plain_name
from qlora_jax.optim.apply_updates import in_f32
from qlora_jax.optim.clipping import clip_by_norm
from qlora_jax.optim.loraplus import rate_factors, scale_updates
from qlora_jax.optim.optimizers_8bit import adamw_8bit_values, lion_8bit_values
from qlora_jax.optim.schedule import make_schedule


def _in_f32(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps state and arithmetic in f32, whatever the parameters' dtype.

    optax computes `decay ** count` with an integer count, which strict dtype promotion forbids.
    """

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, in_f32(params))

    return optax.GradientTransformation(lambda params: transform.init(in_f32(params)), update)


def _adamw_32bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    adamw = optax.adamw(rate, args.beta1, args.beta2, args.eps, weight_decay=args.weight_decay)
    return scale_updates(_in_f32(adamw), rate_factors(args.loraplus_lr_ratio))


def _adamw_8bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    factors = rate_factors(args.loraplus_lr_ratio)
    return adamw_8bit_values(rate, args.beta1, args.beta2, args.eps, args.weight_decay, factors)


def _lion_32bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    lion = optax.lion(rate, args.beta1, args.beta2, weight_decay=args.weight_decay)
    return scale_updates(_in_f32(lion), rate_factors(args.loraplus_lr_ratio))


def _lion_8bit(args: OptimArgs, rate: optax.Schedule) -> optax.GradientTransformation:
    return lion_8bit_values(rate, args.beta1, args.beta2, args.weight_decay, rate_factors(args.loraplus_lr_ratio))


# Elementwise transforms only, because paged state is updated page by page. Names have no `paged_` prefix, which says
# where the state is but does not change the update.
OPTIMIZERS: dict[str, Callable[[OptimArgs, optax.Schedule], optax.GradientTransformation]] = {
    "adamw_32bit": _adamw_32bit,
    "adamw_8bit": _adamw_8bit,
    "lion_32bit": _lion_32bit,
    "lion_8bit": _lion_8bit,
}


def make_elementwise(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer without clipping: an element's update depends only on that element or its 8-bit block."""
    return OPTIMIZERS[plain_name(args.name)](args, make_schedule(args, total_steps))


def make_optimizer(args: OptimArgs, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run: clipping to `max_grad_norm` (0: none), then `args.name` at the schedule's rate.

    Expects f32 gradients. Apply its updates with qlora_jax.optim.apply_updates. The state has leaves for each leaf of
    the pytree passed to `init`, and a step count. `update` takes the global norm as `norm`, if it is known already.
    """
    optimizer = make_elementwise(args, total_steps)
    if args.max_grad_norm == 0:
        return optimizer
    return optax.chain(clip_by_norm(args.max_grad_norm), optimizer)
