"""Low-rank adapters: y = frozen(x) + scaling * dropout(x) A B.

Dimension key: L layers, B rows of the batch, M tokens, K in, N out, R rank.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn
from pallas_kernels.own_matrix import own_matrix
from qlora_jax.nn.dropout import apply_dropout
from qlora_jax.nn.linear import BatchedAdapter, FrozenLayer, LinearAdapter
from qlora_jax.nn.variables import Frozen, TrainedLeaf

RANK_UNIT = 16  # ranks of adapters in a batch are padded to a multiple of it


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lora_deltas(
    x_MK: Float[Array, "M K"],
    lora_a_KR: Float[Array, "K R"],
    lora_bs: tuple[Float[Array, "_ _"], ...],
    scalings: tuple[float, ...],
    dropout: float,
    keys_B: Key[Array, " B"] | None,
) -> tuple[Float[Array, "M _"], ...]:
    """Returns scaling_i * dropout(x) A_i B_i for each i, in x's dtype.

    A and B are cast to x's dtype, and sums are in f32. All A share one product, because a product with 16 columns costs
    hardly less than one with 48. The gradients of A and B are summed in f32 and returned in the dtype of A and B. All i
    share the dropout mask, which the backward pass draws again from `keys_B`.

    Args:
      lora_a_KR: the A_i side by side, in the order of `lora_bs`.
      lora_bs: the B_i, each [R_i, N_i].
      scalings: one factor per i.
      dropout: probability that an element of x is zeroed.
      keys_B: the dropout key of each row of the batch; None: no dropout.
    """
    return forward(x_MK, lora_a_KR, lora_bs, scalings, dropout, keys_B)[0]


def _scaled(product_MR: jax.Array, scalings: tuple[float, ...], lora_bs: tuple[jax.Array, ...], dtype) -> jax.Array:
    """Multiplies each column by the scaling of its adapter."""
    scaling_1R = np.repeat(np.asarray(scalings, np.float32), [b.shape[0] for b in lora_bs])[None]
    return (product_MR * scaling_1R).astype(dtype)


def _split(x_MR: jax.Array, lora_bs: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Splits the columns by the ranks of `lora_bs`."""
    return jnp.split(x_MR, np.cumsum([b.shape[0] for b in lora_bs])[:-1].tolist(), axis=1)


def forward(x_MK, lora_a_KR, lora_bs, scalings, dropout, keys_B):
    """Returns (the deltas, what `backward` needs)."""
    dtype = x_MK.dtype
    xa_MR = _scaled(dot_nn(apply_dropout(x_MK, dropout, keys_B), lora_a_KR.astype(dtype)), scalings, lora_bs, dtype)
    ys = tuple(dot_nn(xa, b.astype(dtype), dtype) for xa, b in zip(_split(xa_MR, lora_bs), lora_bs, strict=True))
    return ys, (x_MK, lora_a_KR, lora_bs, checkpoint_name(xa_MR, "lora_xa"), keys_B)


def backward(scalings, dropout, residuals, dys):
    """Returns the gradients of x, A, each B and the keys; None for that of A if x was not saved."""
    x_MK, lora_a_KR, lora_bs, xa_MR, keys_B = residuals
    dtype = xa_MR.dtype
    d_xa_MR = jnp.concatenate([dot_nt(dy, b.astype(dtype)) for dy, b in zip(dys, lora_bs, strict=True)], axis=1)
    d_xa_MR = _scaled(d_xa_MR, scalings, lora_bs, dtype)
    rows = zip(_split(xa_MR, lora_bs), dys, lora_bs, strict=True)
    d_bs = tuple(dot_tn(xa, dy).astype(b.dtype) for xa, dy, b in rows)
    d_a_KR = None
    if x_MK is not None:
        d_a_KR = dot_tn(apply_dropout(x_MK, dropout, keys_B), d_xa_MR).astype(lora_a_KR.dtype)
    dx_MK = apply_dropout(dot_nt(d_xa_MR, lora_a_KR.astype(dtype), dtype), dropout, keys_B)
    return dx_MK, d_a_KR, d_bs, None


lora_deltas.defvjp(forward, backward)


@runtime_checkable
class HasDropout(Protocol):
    """An adapter with dropout on its inputs."""

    dropout: float


# (adapters, x, probability of dropout, the dropout key of each row of the batch or None) -> the change of each adapter
type Deltas[A] = Callable[[Sequence[A], jax.Array, float, jax.Array | None], Sequence[jax.Array]]


@runtime_checkable
class LowRank(HasDropout, Protocol):
    """An adapter of rank R: A [K, R], B [R, N], and the factor of their product."""

    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam
    scaling: float


class BatchedLoRA(BatchedAdapter):
    """Low-rank adapters of several runs: A [L, runs, K, R] and B [L, runs, R, N], padded with zeros, and scalings.

    The stacks begin with run 1: number 0 is that of tokens without an adapter.
    """

    def __init__(self, adapters: "Sequence[LowRank | None]", layers: int):
        """Stacks adapters; the layers that one lacks are zeros, which change nothing.

        Changes adapters of all layers: their arrays become views of the stacks, because copies would double the memory.
        """
        first = next(adapter for adapter in adapters if adapter is not None)
        dtype, inputs, outputs = first.lora_a[...].dtype, first.lora_a[...].shape[1], first.lora_b[...].shape[2]
        rank = max(adapter.lora_a[...].shape[2] for adapter in adapters if adapter is not None)
        rank = -(-rank // RANK_UNIT) * RANK_UNIT
        runs = adapters[1:]
        lora_a = np.zeros((layers, len(runs), inputs, rank), dtype)
        lora_b = np.zeros((layers, len(runs), rank, outputs), dtype)
        for run, adapter in enumerate(runs):
            if adapter is not None:
                own = getattr(adapter, "adapted_layers", None) or range(layers)
                a, b = np.asarray(adapter.lora_a[...]), np.asarray(adapter.lora_b[...])
                lora_a[[*own], run, :, : a.shape[2]], lora_b[[*own], run, : b.shape[1]] = a, b
        scalings = [0.0 if adapter is None else adapter.scaling for adapter in adapters]
        self.lora_a, self.lora_b = Frozen(jnp.asarray(lora_a)), Frozen(jnp.asarray(lora_b))
        self.scalings = Frozen(jnp.asarray(scalings, jnp.float32))
        self.present = Frozen(jnp.asarray([adapter is not None for adapter in adapters]))
        lora_a, lora_b = np.asarray(self.lora_a[...]), np.asarray(self.lora_b[...])
        for run, adapter in enumerate(runs):
            if adapter is not None and adapter.lora_a[...].shape[0] == layers:
                own_rank = adapter.lora_a[...].shape[2]
                adapter.lora_a = nnx.LoRAParam(lora_a[:, run, :, :own_rank])
                adapter.lora_b = nnx.LoRAParam(lora_b[:, run, :own_rank])

    def delta(self, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        """Returns scaling * x A B of each token in f32; zeros without an adapter."""
        place = 0 if layer is None else layer
        xa_MR = own_matrix(x_MK, self.lora_a[...], place, own_M) * self.scalings[...][own_M][:, None]
        return own_matrix(xa_MR.astype(x_MK.dtype), self.lora_b[...], place, own_M)

    def on_result(self, y_MN: jax.Array, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        """Returns y + scaling * x A B."""
        added_MN = y_MN + self.delta(x_MK, layer, own_M).astype(y_MN.dtype)
        return jnp.where(self.present[...][own_M][:, None], added_MN, y_MN)


class LoRA(LinearAdapter):
    """LoRA or rsLoRA on one projection (Hu et al., 2021): `scaling` is alpha / rank, or alpha / sqrt(rank).

    `lora_a` [L, K, R] and `lora_b` [L, R, N] are in f32 or bf16. Inside the scan over layers they have one layer each.

    Args:
      layers: the numbers of the L layers in the model, ascending; None: all.
    """

    LEAVES = (TrainedLeaf("lora_a"), TrainedLeaf("lora_b"))
    SAVED = ("lora_xa",)
    for_batch = BatchedLoRA

    DELTAS = staticmethod(lora_deltas)

    def __init__(
        self,
        lora_a: Float[Array, "*L K R"],
        lora_b: Float[Array, "*L R N"],
        scaling: float,
        dropout: float,
        layers: tuple[int, ...] | None = None,
    ):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.scaling = scaling
        self.dropout = dropout
        self.adapted_layers = layers

    @classmethod
    def init(
        cls,
        key: jax.Array,
        stack: int,
        shape: tuple[int, int],
        *,
        rank: int,
        scaling: float,
        dropout: float,
        dtype: DTypeLike = jnp.float32,
    ) -> "LoRA":
        """Draws adapters for `stack` layers of weights (N, K), with `initial_factors`."""
        return cls(*initial_factors(key, stack, shape, rank, dtype), scaling, dropout)

    @staticmethod
    def apply(
        adapters: "Sequence[LoRA]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns frozen_i(x) + scaling_i * dropout_i(x) A_i B_i for each i."""
        ys = [one(x_MK) for one in frozen]
        with jax.named_scope("lora"):
            function = functools.partial(low_rank_deltas, function=adapters[0].DELTAS)
            deltas = adapter_deltas(adapters, x_MK, keys, function)
            return [y + delta for y, delta in zip(ys, deltas, strict=True)]

    def select_layer(self, layer: int) -> "LoRA":
        """Returns the adapter of one layer of the model."""
        index = layer if self.adapted_layers is None else self.adapted_layers.index(layer)
        return LoRA(self.lora_a[...][index], self.lora_b[...][index], self.scaling, self.dropout)

    def merge(self, weight: Float[Array, "*L N K"]) -> Float[Array, "*L N K"]:
        """Returns weight + scaling * (A B)^T, in f32."""
        return add_delta(weight, self)

    def straight_through(self, x_MK: jax.Array, dy_MN: jax.Array) -> Mapping[str, jax.Array]:
        """Returns the gradients of A and B in x (W + scaling (A B)^T)^T."""
        a_KR, b_RN, dtype = self.lora_a[...], self.lora_b[...], x_MK.dtype
        xa_MR = _scaled(dot_nn(x_MK, a_KR.astype(dtype)), (self.scaling,), (b_RN,), dtype)
        _, d_a_KR, (d_b_RN,), _ = backward((self.scaling,), 0.0, (x_MK, a_KR, (b_RN,), xa_MR, None), (dy_MN,))
        assert d_a_KR is not None
        return {"lora_a": d_a_KR, "lora_b": d_b_RN}


def lora_scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """Returns alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (Kalajdzievski, 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def initial_factors(
    key: jax.Array,
    stack: int,
    shape: tuple[int, int],
    rank: int,
    dtype: DTypeLike,
    layers: tuple[int, ...] | None = None,
) -> tuple[Float[Array, "L K R"], Float[Array, "L R N"]]:
    """Draws A uniformly in +-1/sqrt(K) and sets B to zero, as PEFT does (Kaiming with a = sqrt(5)).

    The adapter then changes nothing.

    Args:
      stack: number of layers L.
      shape: (N, K) of the frozen weight.
      dtype: dtype of both; A is drawn in f32 and rounded.
      layers: the layers that have an adapter, ascending; None: all. Each gets the A that it gets among all layers.
    """
    n, k = shape
    bound = 1 / math.sqrt(k)
    lora_a = jax.random.uniform(key, (stack, k, rank), jnp.float32, -bound, bound)
    if layers is not None and len(layers) < stack:
        lora_a = lora_a[np.asarray(layers)]
    return lora_a.astype(dtype), jnp.zeros((len(lora_a), rank, n), dtype)


def add_delta(weight: Float[Array, "*L N K"], adapter: LowRank) -> Float[Array, "*L N K"]:
    """Returns weight + scaling * (A B)^T, in f32."""
    delta = dot_nn(adapter.lora_a[...], adapter.lora_b[...]) * adapter.scaling
    return weight.astype(jnp.float32) + jnp.swapaxes(delta, -1, -2)


def adapter_deltas[A: HasDropout](
    adapters: Sequence[A], x_MK: jax.Array, keys: Sequence[jax.Array | None], deltas: Deltas[A]
) -> list[jax.Array]:
    """Returns the change of each adapter for one x; with dropout, masks differ and nothing is shared.

    Args:
      deltas: computes the changes of several adapters that share a dropout mask.
    """
    if all(adapter.dropout == 0.0 or keys_B is None for adapter, keys_B in zip(adapters, keys, strict=True)):
        return list(deltas(adapters, x_MK, 0.0, None))
    return [deltas([one], x_MK, one.dropout, keys_B)[0] for one, keys_B in zip(adapters, keys, strict=True)]


def low_rank_deltas(
    adapters: Sequence[LowRank],
    x_MK: jax.Array,
    dropout: float,
    keys_B: jax.Array | None,
    *,
    function: Callable[..., tuple[jax.Array, ...]] = lora_deltas,
) -> tuple[jax.Array, ...]:
    """Returns scaling_i * dropout(x) A_i B_i for each i.

    Args:
      function: `lora_deltas`, or a function that differs from it in the gradients.
    """
    lora_a_KR = jnp.concatenate([adapter.lora_a[...] for adapter in adapters], axis=1)
    lora_bs = tuple(adapter.lora_b[...] for adapter in adapters)
    return function(x_MK, lora_a_KR, lora_bs, tuple(adapter.scaling for adapter in adapters), dropout, keys_B)
