"""SwiGLU with a VJP that keeps its two inputs in their own dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) * up, computed in f32, in gate's dtype."""
    return _forward(gate, up)[0]


def _forward(gate, up):
    out = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return out.astype(gate.dtype), (gate, up)


def _backward(residuals, dy):
    gate, up = (r.astype(jnp.float32) for r in residuals)
    dy32 = dy.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = dy32 * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.astype(dy.dtype), (dy32 * gate * sigmoid).astype(dy.dtype)


swiglu.defvjp(_forward, _backward)
