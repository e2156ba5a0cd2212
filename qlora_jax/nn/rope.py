"""Rotary position embedding (Su et al., 2021), and its published scalings.

The two dimensions of a rotary pair are half the rotated dimensions apart, as in a Llama, or neighbours.

Dimension key: B batch, T positions, N heads, H head_dim, J = dim / 2 frequencies (H / 2 unless rotation is partial).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A published scaling of rotary frequencies, with the names and numbers of a Hugging Face config.

    Attributes:
      kind: a key of SCALINGS.
      numbers: (name, value) pairs, such as `factor` or `long_factor`.
    """

    kind: str = "default"
    numbers: tuple[tuple[str, float | tuple[float, ...] | bool | None], ...] = ()

    def get(self, name: str) -> float | tuple[float, ...] | None:
        """Returns the number or numbers of that name, or None if the config does not set them."""
        return dict(self.numbers).get(name)

    def number(self, name: str, default: float | None = None) -> float:
        """Returns the number of that name, or `default` if the config does not set it."""
        value = self.get(name)
        value = default if value is None else value
        assert isinstance(value, int | float), f"{self.kind} requires {name}"
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """A map from positions to rotations.

    Attributes:
      theta: base of the frequencies.
      dim: number of rotated dimensions per head.
      max_positions: longest sequence of pretraining.
      scaling: scaling of the frequencies.
    """

    theta: float
    dim: int
    max_positions: int
    scaling: RopeScaling = RopeScaling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryPositionScale:
    """A factor of queries that grows with their position p: 1 + beta log(1 + floor(p / period))."""

    beta: float
    period: int

    def factors(self, positions: Int[Array, "*B T"]) -> Float[Array, "*B T"]:
        """Returns the factor of each position, in f32."""
        periods = jnp.floor(positions.astype(jnp.float32) / self.period)
        return 1 + self.beta * jnp.log(1 + periods)


Frequencies = tuple[np.ndarray, float]  # inverse frequencies f32 [H/2], factor on cos and sin


def _powers(rope: Rope, theta: float | None = None) -> np.ndarray:
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return (1.0 / np.float32(theta or rope.theta) ** exponents).astype(np.float32)


def _default(rope: Rope, length: int) -> Frequencies:
    return _powers(rope), 1.0


def _linear(rope: Rope, length: int) -> Frequencies:
    return (_powers(rope) / np.float32(rope.scaling.number("factor"))).astype(np.float32), 1.0


def _dynamic(rope: Rope, length: int) -> Frequencies:
    factor, trained = rope.scaling.number("factor"), rope.max_positions
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return _powers(rope, rope.theta * stretch ** (rope.dim / (rope.dim - 2))), 1.0


def _llama3(rope: Rope, length: int) -> Frequencies:
    numbers = rope.scaling
    inv_freq = _powers(rope)
    factor, original = numbers.number("factor"), numbers.number("original_max_position_embeddings")
    low, high = numbers.number("low_freq_factor"), numbers.number("high_freq_factor")
    turns = original * inv_freq / (2 * math.pi)  # rotations within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * inv_freq / factor + smooth * inv_freq).astype(np.float32), 1.0


def _yarn(rope: Rope, length: int) -> Frequencies:
    numbers = rope.scaling
    factor = numbers.number("factor")
    original = numbers.number("original_max_position_embeddings", rope.max_positions)

    def dimension(turns: float) -> float:
        return rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(numbers.number("beta_fast", 32.0)), dimension(numbers.number("beta_slow", 1.0))
    if numbers.number("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    inv_freq = _powers(rope)
    mixed = inv_freq / factor * ramp + inv_freq * (1 - ramp)
    return mixed.astype(np.float32), _yarn_attention_factor(numbers, factor)


def _yarn_attention_factor(numbers: RopeScaling, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if numbers.get("attention_factor") is not None:
        return numbers.number("attention_factor")
    mscale, mscale_all = numbers.number("mscale", 0.0), numbers.number("mscale_all_dim", 0.0)
    return magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)


def _longrope(rope: Rope, length: int) -> Frequencies:
    numbers = rope.scaling
    original = numbers.number("original_max_position_embeddings", rope.max_positions)
    stretch = np.asarray(numbers.get("long_factor" if length > original else "short_factor"), np.float32)
    factor = numbers.number("factor", rope.max_positions / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return (_powers(rope) / stretch).astype(np.float32), numbers.number("attention_factor", default)


SCALINGS: dict[str, Callable[[Rope, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

LENGTH_DEPENDENT = ("dynamic", "longrope")

# For each scaling: the required numbers, then the optional ones.
SCALING_NUMBERS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": (
        {"factor"},
        {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"factor", "original_max_position_embeddings", "attention_factor"},
    ),
}


def rotations(
    rope: Rope, positions: Int[Array, "*B T"], length: int
) -> tuple[Float[Array, "*B T J"], Float[Array, "*B T J"]]:
    """Returns (cos(p f_j), sin(p f_j)) for each position p and frequency f_j, in f32.

    Args:
      positions: start at 0 in each row.
      length: largest number of positions; `dynamic` and `longrope` scale by it.
    """
    inv_freq, factor = SCALINGS[rope.scaling.kind](rope, length)
    angles = positions[..., None].astype(jnp.float32) * inv_freq.reshape((1,) * positions.ndim + inv_freq.shape)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def rotate(
    x_BTNH: Float[Array, "B T N H"],
    cos: Float[Array, "*R B T J"],
    sin: Float[Array, "*R B T J"],
    kind: Int[Array, ""] | None = None,
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns (x1 cos - x2 sin, x2 cos + x1 sin, rest) in x's dtype.

    x1 is the first J features of each head, x2 the next J. If interleaved, x1 has the even ones of the first 2 J
    features, x2 the odd ones. A partial rotation leaves the rest unchanged. Differentiable in x only: dx is dy rotated
    back.

    Args:
      kind: index of the rotation if there are R of them. The backward pass saves the index, not the selected rotation.
      interleaved: True if rotary pairs are neighbours.
    """
    return _turn(x_BTNH, cos, sin, kind, interleaved)


def rotate_by_row(
    x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, kind: jax.Array | None, interleaved: bool
) -> jax.Array:
    """Returns `rotate`, for inference: a row's bits depend on that row alone."""
    # The barriers keep XLA from fusing a product with a sum, which rounds once instead of twice in some shapes.
    return _turn(x_BTNH, cos, sin, kind, interleaved, jax.lax.optimization_barrier)


def _turn(
    x_BTNH: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kind: jax.Array | None,
    interleaved: bool,
    hold: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    if kind is not None:
        cos, sin = (jax.lax.dynamic_index_in_dim(x, kind, keepdims=False) for x in (cos, sin))
    half = cos.shape[-1]
    halves = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    if not interleaved:
        halves = slice(0, half), slice(half, 2 * half)
    x1, x2 = (x_BTNH[..., part].astype(jnp.float32) for part in halves)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [hold(x1 * cos) - hold(x2 * sin), hold(x2 * cos) + hold(x1 * sin)]
    # Cast before the concatenation, which XLA does not fuse, so that it copies half as many bytes.
    parts = [part.astype(x_BTNH.dtype) for part in turned]
    if interleaved:
        parts = [jnp.stack(parts, axis=-1).reshape(*x_BTNH.shape[:-1], 2 * half)]
    rest = [x_BTNH[..., 2 * half :]] if 2 * half < x_BTNH.shape[-1] else []
    return jnp.concatenate(parts + rest, axis=-1)


def _forward(x_BTNH, cos, sin, kind, interleaved):
    return _turn(x_BTNH, cos, sin, kind, interleaved), (cos, sin, kind)


def _backward(interleaved, residuals, dy_BTNH):
    cos, sin, kind = residuals
    return _turn(dy_BTNH, cos, -sin, kind, interleaved), None, None, None


rotate.defvjp(_forward, _backward)
