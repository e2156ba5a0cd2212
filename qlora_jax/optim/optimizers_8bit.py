"""AdamW and Lion with 8-bit state, in the arithmetic of bitsandbytes 0.50.2's CPU backend.

`adamw_8bit` and `lion_8bit` are optax transformations. A run uses `adamw_8bit_values` and `lion_8bit_values`, whose
updates are the new parameters themselves. These are bit-identical to bitsandbytes on a CPU with fused multiply-add,
given the same parameters, gradients and rates, and square roots rounded as in IEEE 754. (torch takes square roots from
Intel's MKL, which is an ulp off for one value in five.)

A step dequantizes the moments, updates them in f32, updates the parameters with the unquantized moments, and quantizes
the moments again. Weight decay comes first: p (1 - lr wd). The CUDA kernels of bitsandbytes differ:

- weight decay follows the step: (p + u) (1 - lr wd);
- codes are the nearest of the map, and a code of the first moment is moved by one where its sign would be lost; here
  codes are looked up at 65,536 steps from -1 to 1 (qlora_jax/quant/dynamic_8bit.py);
- a gradient that is not finite leaves its parameter unchanged; here the loss becomes non-finite, and training stops.

Dimension key: L tensors of a leaf, stacked along axis 0, S = ceil(n / 256) blocks of a tensor of n elements.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, UInt8

from pallas_kernels.formats.tables import dynamic_map, rounded
from qlora_jax.optim.loraplus import Factors
from qlora_jax.optim.updates import NewValue
from qlora_jax.quant.dynamic_8bit import quantize_blocks
from qlora_jax.sharding import BLOCK

# Optimizer state in 8 bits: blocks of 256 elements with one scale each, and codes of a dynamic map.
#
# A leaf is a stack of tensors along axis 0, usually one per layer, as LoRA parameters are. Blocks are counted from each
# tensor's start and never cross into the next, so a page of some layers has whole blocks. Codes take 1 byte per element
# and scales 4 bytes per block: 1.016 bytes per element.

MIN_SIZE = 4096  # tensors of fewer elements keep f32 state: bitsandbytes' min_8bit_size


class Quantized(NamedTuple):
    """A quantized leaf: x = map[codes] * absmax of the block."""

    codes: UInt8[Array, "L ..."]
    absmax_LS: Float[Array, "L S"]


def is_large(shape: tuple[int, ...]) -> bool:
    """True if the tensors of a leaf, shape[1:], are large enough for state in 8 bits."""
    return math.prod(shape[1:]) >= MIN_SIZE


def state_zeros(shape: tuple[int, ...]) -> Quantized | jax.Array:
    """Returns the state leaf at step 0 for parameters of this shape: scales of 0, or f32 zeros if tensors are small."""
    if not is_large(shape):
        return jnp.zeros(shape, jnp.float32)
    blocks = -(-math.prod(shape[1:]) // BLOCK)
    return Quantized(jnp.zeros(shape, jnp.uint8), jnp.zeros((shape[0], blocks), jnp.float32))


def dequantize(state: Quantized, signed: bool) -> Float[Array, "L ..."]:
    """Computes map[codes] * absmax, in f32."""
    levels = jnp.take(jnp.asarray(dynamic_map(signed)), state.codes.astype(jnp.int32), mode="clip")
    return _tensors(_blocks(levels) * state.absmax_LS[:, :, None], state.codes.shape)


def quantize(x: Float[Array, "L ..."], signed: bool) -> Quantized:
    """Quantizes to absmax = max |x| of each block, and codes (qlora_jax.quant.dynamic_8bit)."""
    codes, absmax_LS = quantize_blocks(_blocks(x), signed)
    return Quantized(_tensors(codes, x.shape), absmax_LS)


def _blocks(x: jax.Array) -> jax.Array:
    """Reshapes [L, ...] to [L, S, 256]; the last block of each tensor is padded with zeros."""
    flat = x.reshape(x.shape[0], -1)
    missing = -flat.shape[1] % BLOCK
    filled = jnp.pad(flat, ((0, 0), (0, missing))) if missing else flat
    return filled.reshape(x.shape[0], -1, BLOCK)


def _tensors(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverts `_blocks`."""
    return blocks.reshape(shape[0], -1)[:, : math.prod(shape[1:])].reshape(shape)


Moments = tuple[Array, ...]  # f32
Scalars = dict[str, Array]
# (parameter, gradient, moments, scalars), all f32 -> (parameter, moments)
Step = Callable[[Array, Array, Moments, Scalars], tuple[Array, Moments]]


class EightBitState(NamedTuple):
    """The number of steps taken, and a tree like the parameters for each moment."""

    count: Array
    moments: tuple[PyTree, ...]


class Rule(NamedTuple):
    """The arithmetic of one optimizer.

    Attributes:
      signed: for each moment, True if it has negative values.
      scalars: (step from 1, learning rate), both f64 -> factors, f64.
      large: the step for moments stored in 8 bits.
      small: the step for moments stored in f32, where bitsandbytes rounds differently.
    """

    signed: tuple[bool, ...]
    scalars: Callable[[Array, Array], Scalars]
    large: Step
    small: Step


def adamw_8bit(
    learning_rate: float | optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """AdamW whose moments take one byte per element, as an optax transformation: `optax.adamw` with 8-bit state.

    >>> optimizer, params = q.adamw_8bit(0.1, weight_decay=0.0), {"w": jnp.ones((1, 4096))}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> updates["w"][0, :2].round(3)
    Array([-0.1, -0.1], dtype=float32)
    >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # optax.adamw's has 32,772 bytes
    8324

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p = p (1 - lr wd) - lr (m / c1) / (sqrt(v) / c2 + eps), with
    c1 = 1 - b1^t and c2 = sqrt(1 - b2^t). The state is bit-identical to that of a run with `optim.name: adamw_8bit`.
    `optax.apply_updates` gives that run's f32 parameters bit for bit, except for elements that more than double, more
    than halve or change their sign in the step. No f32 update may reach their exact value: they may be off by an ulp of
    the update.

    A leaf is a stack of tensors along axis 0, as LoRA parameters are ([layers, K, R]). Tensors of fewer than 4,096
    elements keep f32 moments, as in bitsandbytes. A matrix that is not stacked therefore needs a leading axis of 1.

    Args:
      learning_rate: a number, or a schedule from the step number, counted from 0.
      weight_decay: multiplied by the learning rate.

    Returns:
      A transformation whose `update` requires `params`. Its updates are f32.
    """
    return _as_deltas(adamw_8bit_values(_schedule(learning_rate), b1, b2, eps, weight_decay))


def lion_8bit(
    learning_rate: float | optax.Schedule, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 1e-3
) -> optax.GradientTransformation:
    """Lion whose moment takes one byte per element, as an optax transformation: `optax.lion` with 8-bit state.

    >>> optimizer, params = q.lion_8bit(0.1, weight_decay=0.0), {"w": jnp.ones((1, 4096))}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> updates["w"][0, :2].round(3)
    Array([-0.1, -0.1], dtype=float32)

    p = p (1 - lr wd) - lr sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g. See `adamw_8bit` for stacks, arguments, and
    how exactly the updates are those of a run.
    """
    return _as_deltas(lion_8bit_values(_schedule(learning_rate), b1, b2, weight_decay))


def _schedule(learning_rate: float | optax.Schedule) -> optax.Schedule:
    return learning_rate if callable(learning_rate) else lambda count: jnp.float32(learning_rate)


def _as_deltas(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transform with updates u for which p + u is the new parameter.

    Its state is the flat tuple of the transform's arrays: nnx.Optimizer does not support a `Quantized` per parameter.
    """

    def init(params: PyTree) -> tuple[Array, ...]:
        return tuple(jax.tree.leaves(transform.init(params)))

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("params: found None, expected the parameters. Pass them to update as its third argument.")
        structure = jax.tree.structure(jax.eval_shape(transform.init, params))
        values, nested = transform.update(updates, jax.tree.unflatten(structure, jax.tree.leaves(state)), params)
        deltas = jax.tree.map(lambda p, new: _delta(p.astype(jnp.float32), new.value), params, values)
        return deltas, tuple(jax.tree.leaves(nested))

    return optax.GradientTransformation(init, update)


def _delta(param: Array, new: Array) -> Array:
    """new - param, corrected by what a first addition misses."""
    delta = new - param
    return delta + (new - rounded(param + delta))


def adamw_8bit_values(
    learning_rate: optax.Schedule,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factors: Factors | None = None,
) -> optax.GradientTransformation:
    """AdamW as in `adamw_8bit`; updates are `NewValue`, to be applied with qlora_jax.optim.updates.

    Args:
      factors: the factor of the learning rate of each leaf; None: 1.
    """

    def scalars(step: Array, rate: Array) -> Scalars:
        c1, c2 = 1.0 - jnp.power(beta1, step), jnp.sqrt(1.0 - jnp.power(beta2, step))
        per_step = {"c2": c2, "eps c2": eps * c2, "-lr/c1": -rate / c1, "-lr c2/c1": -rate * c2 / c1}
        return per_step | {"1-lr wd": 1.0 - rate * weight_decay}

    def moments(g: Array, m: Array, v: Array) -> tuple[Array, Array]:
        return _mixed(m, beta1, g, 1.0 - beta1), _mixed(v, beta2, g, rounded((1.0 - beta2) * g))

    def large(p: Array, g: Array, mv: Moments, by: Scalars) -> tuple[Array, Moments]:
        m, v = moments(g, *mv)
        denominator = _quotient(jnp.sqrt(v), by["c2"]) + eps
        return _decayed(p, by, weight_decay) + by["-lr/c1"] * m / denominator, (m, v)

    def small(p: Array, g: Array, mv: Moments, by: Scalars) -> tuple[Array, Moments]:
        m, v = moments(g, *mv)
        return _decayed(p, by, weight_decay) + by["-lr c2/c1"] * (m / (jnp.sqrt(v) + by["eps c2"])), (m, v)

    return _transform(Rule((True, False), scalars, large, small), learning_rate, factors)


def lion_8bit_values(
    learning_rate: optax.Schedule, beta1: float, beta2: float, weight_decay: float, factors: Factors | None = None
) -> optax.GradientTransformation:
    """Lion as in `lion_8bit`; updates are `NewValue`, to be applied with qlora_jax.optim.updates.

    Args:
      factors: the factor of the learning rate of each leaf; None: 1.
    """

    def scalars(step: Array, rate: Array) -> Scalars:
        return {"-lr": -rate, "1-lr wd": 1.0 - rate * weight_decay}

    def with_sign(sign: Callable[[Array, Array], Array]) -> Step:
        def step(p: Array, g: Array, m: Moments, by: Scalars) -> tuple[Array, Moments]:
            moved = _decayed(p, by, weight_decay) + by["-lr"] * sign(m[0], g)
            return moved, (_mixed(m[0], beta2, g, 1.0 - beta2),)

        return step

    large = with_sign(lambda m, g: jnp.sign(rounded(beta1 * m) + rounded((1.0 - beta1) * g)))
    small = with_sign(lambda m, g: jnp.sign(_mixed(m, beta1, g, 1.0 - beta1)))
    return _transform(Rule((True,), scalars, large, small), learning_rate, factors)


def _mixed(moment: Array, decay: float, g: Array, share: float | Array) -> Array:
    """decay * moment, rounded, + share * g, in one fused step: torch's mul_, then add_."""
    return rounded(decay * moment) + share * g


def _decayed(p: Array, by: Scalars, weight_decay: float) -> Array:
    return rounded(p * by["1-lr wd"]) if weight_decay > 0 else p


def _quotient(x: Array, divisor: Array) -> Array:
    """Returns x / divisor for x >= 0. The select keeps XLA from multiplying by the divisor's reciprocal instead."""
    return x / jnp.where(x >= 0, divisor, jnp.nan)


def _transform(rule: Rule, learning_rate: optax.Schedule, factors: Factors | None) -> optax.GradientTransformation:
    def init(params: PyTree) -> EightBitState:
        trees = tuple(jax.tree.map(lambda p: state_zeros(p.shape), params) for _ in rule.signed)
        return EightBitState(jnp.zeros([], jnp.int32), trees)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        leaves, structure = jax.tree.flatten(params)
        rate = jnp.asarray(learning_rate(state.count))
        factor_of = [1.0] * len(leaves) if factors is None else jax.tree.leaves(factors(params))
        by = {factor: _scalars(rule, state.count, rate, factor) for factor in dict.fromkeys(factor_of)}
        columns = [factor_of, leaves, *(structure.flatten_up_to(tree) for tree in (updates, *state.moments))]
        stepped = [_leaf_step(rule, by[factor], p, g, moments) for factor, p, g, *moments in zip(*columns, strict=True)]
        values, *moments = (structure.unflatten(column) for column in zip(*stepped, strict=True))
        return values, EightBitState(jnp.asarray(optax.safe_increment(state.count)), tuple(moments))

    return optax.GradientTransformation(init, update)


def _scalars(rule: Rule, count: Array, rate: Array, factor: float) -> Scalars:
    """The rule's scalars at `factor` times the learning rate, computed in f64 as in Python, then rounded to f32."""
    with jax.enable_x64(True):
        step, rate = count.astype(jnp.float64) + 1.0, rate.astype(jnp.float64)
        exact = rule.scalars(step, rate if factor == 1.0 else rate * factor)
        return {name: value.astype(jnp.float32) for name, value in exact.items()}


def _leaf_step(
    rule: Rule, by: Scalars, p: Array, g: Array, moments: Sequence[Array | Quantized]
) -> tuple[NewValue | Array | Quantized, ...]:
    """(the new parameter, its stored moments)."""
    # The state knows whether it is in 8 bits. The shape does not: on a mesh, `p` is a part of the parameter.
    if not any(isinstance(moment, Quantized) for moment in moments):
        in_f32 = tuple(moment for moment in moments if isinstance(moment, Array))
        value, new = rule.small(p.astype(jnp.float32), g.astype(jnp.float32), in_f32, by)
        return NewValue(value), *new

    # Tensor by tensor and in place: f32 moments of whole leaves would take more than the 8 bits save.
    def tensor_step(index: Array, stored: tuple[Array | Quantized, ...]) -> tuple[Array | Quantized, ...]:
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), (g, *stored))
        return jax.tree.map(
            lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, index, 0),
            stored,
            _tensor_step(rule, by, *own),
        )

    value, *new = jax.lax.fori_loop(0, p.shape[0], tensor_step, (p, *moments))
    return NewValue(value), *new


def _tensor_step(rule: Rule, by: Scalars, g: Array, p: Array, *moments: Quantized) -> tuple[Array | Quantized, ...]:
    """(parameter, stored moments) after a step."""
    values = tuple(dequantize(moment, signed) for moment, signed in zip(moments, rule.signed, strict=True))
    value, new = rule.large(p.astype(jnp.float32), g.astype(jnp.float32), values, by)
    stored = (quantize(moment, signed) for moment, signed in zip(new, rule.signed, strict=True))
    return value.astype(p.dtype), *stored
