"""Trainable rows of embedding and head for new tokens, while the tables stay frozen.

  lookup(t) = rows_i where t = ids_i, table_t elsewhere;    logits of ids_i = hidden rows_i^T

Rows are cast to the compute dtype, and their gradients are summed in f32. Both directions are one-hot products, because
a scatter would leave the order of additions open.

Dimension key: M tokens, D embed, V rows of the frozen table, N rows that train.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn
from qlora_jax.nn.variables import Frozen, TrainedLeaf


def one_hot_ids(tokens_M: Int[Array, " M"], ids: tuple[int, ...]) -> Bool[Array, "M N"]:
    """Compares each token with each of `ids`."""
    return tokens_M[:, None] == np.asarray(ids, np.int32)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_rows(rows_ND: Float[Array, "N D"], hot_MN: Bool[Array, "M N"], dtype: DTypeLike) -> Float[Array, "M D"]:
    """Returns the row of each token in `dtype`; a token without a row gets row 0, which then has no gradient."""
    return rows_ND.astype(dtype)[jnp.argmax(hot_MN, axis=1)]


def _picked_forward(rows_ND, hot_MN, dtype):
    return gather_rows(rows_ND, hot_MN, dtype), (rows_ND, hot_MN)


def _picked_backward(dtype, residuals, d_MD):
    rows_ND, hot_MN = residuals
    return dot_tn(hot_MN.astype(dtype), d_MD).astype(rows_ND.dtype), None


gather_rows.defvjp(_picked_forward, _picked_backward)


@jax.custom_vjp
def row_logits(hidden_MD: Float[Array, "M D"], rows_ND: Float[Array, "N D"]) -> Float[Array, "M N"]:
    """Returns hidden rows^T in f32, with rows cast to the dtype of `hidden_MD`."""
    return dot_nt(hidden_MD, rows_ND.astype(hidden_MD.dtype))


def _logits_forward(hidden_MD, rows_ND):
    return row_logits(hidden_MD, rows_ND), (hidden_MD, rows_ND)


def _logits_backward(residuals, d_MN):
    hidden_MD, rows_ND = residuals
    dtype = hidden_MD.dtype
    d_MN = d_MN.astype(dtype)
    return dot_nn(d_MN, rows_ND.astype(dtype), dtype), dot_tn(d_MN, hidden_MD).astype(rows_ND.dtype)


row_logits.defvjp(_logits_forward, _logits_backward)


class NewTokenRows(nnx.Module):
    """Trainable rows of one table, for the tokens `ids`.

    `rows` [N, D] is in f32 or bf16. The head's biases [N] of these tokens stay frozen.
    """

    LEAVES = (TrainedLeaf("rows"),)

    def __init__(self, rows_ND: Float[Array, "N D"], bias_N: Float[Array, " N"] | None, ids: tuple[int, ...]):
        self.rows = nnx.LoRAParam(rows_ND)
        self.bias = None if bias_N is None else Frozen(bias_N)
        self.ids = ids

    @classmethod
    def init(
        cls,
        table_VD: Float[Array, "V D"],
        bias_V: Float[Array, " V"] | None,
        ids: tuple[int, ...],
        dtype: DTypeLike = jnp.float32,
    ) -> "NewTokenRows":
        """Sets each row to the mean of the table's rows, and each bias to the mean of the biases, computed in f32."""
        row_D = jnp.mean(table_VD, axis=0, dtype=jnp.float32).astype(dtype)
        bias_N = None
        if bias_V is not None:
            bias_N = jnp.full(len(ids), jnp.mean(bias_V, dtype=jnp.float32), bias_V.dtype)
        return cls(jnp.tile(row_D[None], (len(ids), 1)), bias_N, ids)

    def lookup(self, tokens_M: Int[Array, " M"], table_VD: Float[Array, "V D"]) -> Float[Array, "M D"]:
        """Returns the row of each token, in the table's dtype."""
        hot_MN = one_hot_ids(tokens_M, self.ids)
        with jax.named_scope("new_tokens"):
            own_MD = gather_rows(self.rows[...], hot_MN, table_VD.dtype)
        return jnp.where(jnp.any(hot_MN, axis=1)[:, None], own_MD, table_VD.at[tokens_M].get(mode="clip"))

    def insert_into(self, table_VD: jax.Array) -> jax.Array:
        """Returns the table with these rows inserted, extended if an id lies beyond it, in its dtype."""
        return _put(table_VD, self.rows[...], self.ids)

    def insert_bias_into(self, bias_V: jax.Array) -> jax.Array:
        """Returns the biases with those of these rows inserted."""
        assert self.bias is not None
        return _put(bias_V, self.bias[...], self.ids)


def _put(table: jax.Array, rows: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    beyond = max(0, max(ids) + 1 - table.shape[0])
    longer = jnp.pad(table, ((0, beyond),) + ((0, 0),) * (table.ndim - 1))
    return longer.at[np.asarray(ids)].set(rows.astype(table.dtype))


class TrainableTable(nnx.Module):
    """A trainable table in place of the frozen one: `weight` [V, D] in f32 or bf16, cast to the compute dtype."""

    LEAVES = (TrainedLeaf("weight"),)

    def __init__(self, weight_VD: Float[Array, "V D"]):
        self.weight = nnx.LoRAParam(weight_VD)

    def lookup(self, tokens_M: Int[Array, " M"], table_VD: Float[Array, "_ D"]) -> Float[Array, "M D"]:
        """Returns the row of each token, in the frozen table's dtype."""
        return self.weight[...].at[tokens_M].get(mode="clip").astype(table_VD.dtype)

    def insert_into(self, table_VD: jax.Array) -> jax.Array:
        """Returns this table in the frozen one's dtype."""
        return self.weight[...].astype(table_VD.dtype)
