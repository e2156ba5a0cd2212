"""AdamW and Lion with state in 8 bits (blockwise.py), in the arithmetic of bitsandbytes 0.50.2's CPU backend.

Equal to it to the bit on a CPU with fused multiply-add, given the same parameters, gradients and rates, with square
roots rounded as IEEE 754 has it (torch's own, from Intel's MKL, is an ulp off for one value in five).

A step dequantizes the moments, updates them in f32, updates the parameters with them as they are, and quantizes them
again. Weight decay comes first: p (1 - lr wd). What its CUDA kernels do otherwise:

- weight decay follows the step: (p + u) (1 - lr wd);
- codes are the nearest of the map, and a code of the first moment is moved by one where its sign would be lost; here
  codes are looked up at 65,536 steps from -1 to 1 (qlora_jax/quant/dynamic_8bit.py);
- a gradient that is not finite leaves its parameter as it is; here it shows in the loss, and training stops.

Dimension key: L tensors of a leaf, stacked along axis 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.formats.rounding import rounded
from qlora_jax.optim.apply_updates import Written
from qlora_jax.optim.state_8bit import Quantized, dequantize, is_large, quantize, state_zeros

Array = jax.Array
Moments = tuple[Array, ...]
Scalars = dict[str, Array]
# (parameter, gradient, moments, scalars), all f32 -> (parameter, moments)
Step = Callable[[Array, Array, Moments, Scalars], tuple[Array, Moments]]


class EightBitState(NamedTuple):
    """Steps taken, and a tree like the parameters for each moment."""

    count: Array
    moments: tuple[Any, ...]


class Rule(NamedTuple):
    """An optimizer.

    Attributes:
      signed: of each moment, whether it has signs.
      scalars: (step from 1, learning rate), both f64 -> factors, f64.
      large: the step on moments that are held in 8 bits; `small`: on those in f32, where bitsandbytes rounds otherwise.
    """

    signed: tuple[bool, ...]
    scalars: Callable[[Array, Array], Scalars]
    large: Step
    small: Step


def adamw_8bit(
    learning_rate: optax.Schedule, beta1: float, beta2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p = p (1 - lr wd) - lr m / c1 / (sqrt(v) / c2 + eps).

    c1 = 1 - b1^t, c2 = sqrt(1 - b2^t). Updates are `Written`: apply them with qlora_jax.optim.apply_updates.
    """

    def scalars(step: Array, rate: Array) -> Scalars:
        c1, c2 = 1.0 - jnp.power(beta1, step), jnp.sqrt(1.0 - jnp.power(beta2, step))
        per_step = {"c2": c2, "eps c2": eps * c2, "-lr/c1": -rate / c1, "-lr c2/c1": -rate * c2 / c1}
        return per_step | {"kept": 1.0 - rate * weight_decay}

    def moments(g: Array, m: Array, v: Array) -> tuple[Array, Array]:
        return _mixed(m, beta1, g, 1.0 - beta1), _mixed(v, beta2, g, rounded((1.0 - beta2) * g))

    def large(p: Array, g: Array, mv: Moments, by: Scalars) -> tuple[Array, Moments]:
        m, v = moments(g, *mv)
        denominator = _quotient(jnp.sqrt(v), by["c2"]) + eps
        return _decayed(p, by, weight_decay) + by["-lr/c1"] * m / denominator, (m, v)

    def small(p: Array, g: Array, mv: Moments, by: Scalars) -> tuple[Array, Moments]:
        m, v = moments(g, *mv)
        return _decayed(p, by, weight_decay) + by["-lr c2/c1"] * (m / (jnp.sqrt(v) + by["eps c2"])), (m, v)

    return _transform(Rule((True, False), scalars, large, small), learning_rate)


def lion_8bit(
    learning_rate: optax.Schedule, beta1: float, beta2: float, weight_decay: float
) -> optax.GradientTransformation:
    """p = p (1 - lr wd) - lr sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g. Updates are `Written`, as AdamW's."""

    def scalars(step: Array, rate: Array) -> Scalars:
        return {"-lr": -rate, "kept": 1.0 - rate * weight_decay}

    def with_sign(sign: Callable[[Array, Array], Array]) -> Step:
        def step(p: Array, g: Array, m: Moments, by: Scalars) -> tuple[Array, Moments]:
            moved = _decayed(p, by, weight_decay) + by["-lr"] * sign(m[0], g)
            return moved, (_mixed(m[0], beta2, g, 1.0 - beta2),)

        return step

    large = with_sign(lambda m, g: jnp.sign(rounded(beta1 * m) + rounded((1.0 - beta1) * g)))
    small = with_sign(lambda m, g: jnp.sign(_mixed(m, beta1, g, 1.0 - beta1)))
    return _transform(Rule((True,), scalars, large, small), learning_rate)


def _mixed(moment: Array, decay: float, g: Array, share: Any) -> Array:
    """decay * moment, rounded, + share * g, in one fused step: as torch's mul_ and then add_."""
    return rounded(decay * moment) + share * g


def _decayed(p: Array, by: Scalars, weight_decay: float) -> Array:
    return rounded(p * by["kept"]) if weight_decay > 0 else p


def _quotient(x: Array, divisor: Array) -> Array:
    """x / divisor for x of 0 or more. XLA multiplies by a scalar's reciprocal, but not by that of a select."""
    return x / jnp.where(x >= 0, divisor, jnp.nan)


def _transform(rule: Rule, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    def init(params: Any) -> EightBitState:
        trees = tuple(jax.tree.map(lambda p: state_zeros(p.shape), params) for _ in rule.signed)
        return EightBitState(jnp.zeros([], jnp.int32), trees)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(params)
        by = _scalars(rule, state.count, jnp.asarray(learning_rate(state.count)))
        columns = [structure.flatten_up_to(tree) for tree in (updates, *state.moments)]
        stepped = [_leaf_step(rule, by, p, g, moments) for p, g, *moments in zip(leaves, *columns, strict=True)]
        written, *moments = (structure.unflatten(column) for column in zip(*stepped, strict=True))
        return written, EightBitState(jnp.asarray(optax.safe_increment(state.count)), tuple(moments))

    return optax.GradientTransformation(init, update)


def _scalars(rule: Rule, count: Array, rate: Array) -> Scalars:
    """In f64, as Python has them, then rounded to f32."""
    with jax.enable_x64(True):
        exact = rule.scalars(count.astype(jnp.float64) + 1.0, rate.astype(jnp.float64))
        return {name: value.astype(jnp.float32) for name, value in exact.items()}


def _leaf_step(rule: Rule, by: Scalars, p: Array, g: Array, moments: list[Any]) -> tuple[Any, ...]:
    """(the written parameter, its moments as they are held)."""
    if not is_large(p.shape):
        value, new = rule.small(p.astype(jnp.float32), g.astype(jnp.float32), tuple(moments), by)
        return Written(value), *new

    # Tensor by tensor and in place: f32 moments of whole leaves would take more than the 8 bits save.
    def tensor_step(index: Array, held: tuple[Any, ...]) -> tuple[Any, ...]:
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), (g, *held))
        return jax.tree.map(
            lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, index, 0),
            held,
            _tensor_step(rule, by, *own),
        )

    value, *new = jax.lax.fori_loop(0, p.shape[0], tensor_step, (p, *moments))
    return Written(value), *new


def _tensor_step(rule: Rule, by: Scalars, g: Array, p: Array, *moments: Quantized) -> tuple[Any, ...]:
    """(parameter, moments) after a step, as they are held."""
    values = tuple(dequantize(moment, signed) for moment, signed in zip(moments, rule.signed, strict=True))
    value, new = rule.large(p.astype(jnp.float32), g.astype(jnp.float32), values, by)
    held = (quantize(moment, signed) for moment, signed in zip(new, rule.signed, strict=True))
    return value.astype(p.dtype), *held
