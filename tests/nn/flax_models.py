"""Flax NNX models as their users write them: nothing in this file knows of 4-bit layers."""

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """Two linear layers around a norm, as in the first examples of Flax's documentation."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.norm = nnx.LayerNorm(2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.norm(self.up(x))))


class EncoderLayer(nnx.Module):
    """A transformer's layer over `nnx.MultiHeadAttention`, whose projections are `nnx.LinearGeneral`."""

    def __init__(self, rngs: nnx.Rngs, width: int):
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=width, decode=False, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 2 * width, rngs=rngs), nnx.relu, nnx.Linear(2 * width, width, rngs=rngs)
        )
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """Token ids [B, T] -> logits [B, T, vocabulary], its layers in an `nnx.List`."""

    def __init__(self, rngs: nnx.Rngs, vocabulary: int = 32, width: int = 64, depth: int = 2):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(rngs, width) for _ in range(depth)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class StackedMLP(nnx.Module):
    """Layers created by `nnx.vmap` and run by `nnx.scan`: every leaf of `layers` has a leading axis of layers."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64, depth: int = 3, remat: bool = False):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> MLP:
            return MLP(rngs, width)

        self.layers = create(rngs)
        self.remat = remat

    def __call__(self, x):
        def layer(x: jax.Array, layer: MLP) -> jax.Array:
            return x + layer(x)

        body = nnx.remat(layer) if self.remat else layer
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def batch(width: int = 64, rows: int = 5) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (rows, width), jnp.float32)
