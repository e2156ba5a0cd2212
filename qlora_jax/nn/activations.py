"""MLP activations with VJPs that save inputs in their own dtype."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Activation(NamedTuple):
    """An elementwise function on f32: its value alone, and its value with its slope."""

    value: Callable[[jax.Array], jax.Array]
    with_slope: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    sigmoid = jax.nn.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x P(x), with P the normal distribution function."""
    probability = 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))
    return x * probability, probability + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    slope_at_0 = math.sqrt(2 / math.pi)
    tanh = jnp.tanh(slope_at_0 * (x + 0.044715 * x * x * x))
    d_u = slope_at_0 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * d_u


def _relu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max(x, 0), whose slope at 0 is 0."""
    return jax.nn.relu(x), (x > 0).astype(x.dtype)


ACTIVATIONS = {
    "relu": Activation(jax.nn.relu, _relu),
    "silu": Activation(jax.nn.silu, _silu),
    "gelu": Activation(functools.partial(jax.nn.gelu, approximate=False), _gelu),
    "gelu_tanh": Activation(functools.partial(jax.nn.gelu, approximate=True), _gelu_tanh),
}


class ClampedSwiglu(NamedTuple):
    """The gate of gpt-oss: (up + 1) gate sigmoid(alpha gate), with gate <= limit and -limit <= up <= limit.

    A clamped entry has no gradient; one that equals the limit has, as in torch.
    """

    alpha: float
    limit: float

    def value(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Returns the result for f32 inputs."""
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * (gate * jax.nn.sigmoid(self.alpha * gate))

    def gradients(self, gate: jax.Array, up: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (d_gate, d_up) for f32 inputs."""
        gate_passes, up_passes = gate <= self.limit, jnp.abs(up) <= self.limit
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        sigmoid = jax.nn.sigmoid(self.alpha * gate)
        slope = sigmoid * (1 + self.alpha * gate * (1 - sigmoid))
        return jnp.where(gate_passes, dy * (up + 1) * slope, 0), jnp.where(up_passes, dy * gate * sigmoid, 0)


GateActivation = str | ClampedSwiglu  # a key of ACTIVATIONS, or one that takes gate and up together


def gated_value(gate: jax.Array, up: jax.Array, activation: GateActivation) -> jax.Array:
    """Returns act(gate) * up, or a clamped SwiGLU, in f32."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if isinstance(activation, ClampedSwiglu):
        return activation.value(gate, up)
    return ACTIVATIONS[activation].value(gate) * up


def gated_gradients(
    gate: jax.Array, up: jax.Array, dy: jax.Array, activation: GateActivation
) -> tuple[jax.Array, jax.Array]:
    """Returns (d_gate, d_up) of `gated_value` in f32."""
    gate, up, dy = (x.astype(jnp.float32) for x in (gate, up, dy))
    if isinstance(activation, ClampedSwiglu):
        return activation.gradients(gate, up, dy)
    value, slope = ACTIVATIONS[activation].with_slope(gate)
    return dy * up * slope, dy * value


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated_activation(
    gate: Float[Array, "... F"], up: Float[Array, "... F"], activation: GateActivation
) -> Float[Array, "... F"]:
    """Returns act(gate) * up, or a clamped SwiGLU, in gate's dtype, computed in f32."""
    return _gated_forward(gate, up, activation)[0]


def _gated_forward(gate, up, activation):
    return gated_value(gate, up, activation).astype(gate.dtype), (gate, up)


def _gated_backward(activation, residuals, dy):
    gate, up = residuals
    d_gate, d_up = gated_gradients(gate, up, dy, activation)
    return d_gate.astype(dy.dtype), d_up.astype(dy.dtype)


gated_activation.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def apply_activation(x: Float[Array, "... F"], activation: str) -> Float[Array, "... F"]:
    """Returns act(x) in x's dtype, computed in f32.

    Args:
      activation: a key of ACTIVATIONS.
    """
    return _forward(x, activation)[0]


def _forward(x, activation):
    return ACTIVATIONS[activation].value(x.astype(jnp.float32)).astype(x.dtype), x


def _backward(activation, x, dy):
    _, slope = ACTIVATIONS[activation].with_slope(x.astype(jnp.float32))
    return ((dy.astype(jnp.float32) * slope).astype(dy.dtype),)


apply_activation.defvjp(_forward, _backward)
