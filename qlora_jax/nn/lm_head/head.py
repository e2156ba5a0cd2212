"""Language model heads: a frozen one, one with trainable rows, and a trainable one.

Dimension key: M or C tokens, D embed, V rows of the frozen head, N trainable rows, W = max(V, largest id + 1).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_matmul import FEW_ROWS, dot_nt
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from pallas_kernels.formats.qtensor import Leaf, QTensor
from qlora_jax.nn.frozen_weight import frozen_linear, is_packed
from qlora_jax.nn.lm_head.new_token_rows import one_hot_ids, row_logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """A frozen head: softcap tanh(scale (hidden weight^T + bias) / softcap); scale, bias and softcap are optional.

    Attributes:
      weight_VD: [V, D]; tiles.py reads it in tiles of rows. Codes are for `logits` alone.
      bias_V: [V], or None.
      softcap: cap of the logits, or None.
      masked_V: bool [V], rows that trainable rows replace, with logits of -inf; None: no row.
      scale: factor of the logits, or None.
    """

    weight_VD: Leaf
    bias_V: Leaf = None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    masked_V: Leaf = None
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})

    def logits(self, hidden_MD: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """Returns the logits in f32."""
        if is_packed(self.weight_VD):
            x_MD = hidden_MD.astype(jnp.float32)
            few = [x_MD[at : at + FEW_ROWS] for at in range(0, len(x_MD), FEW_ROWS)]  # more would dequantize all rows
            logits_MV = jnp.concatenate([frozen_linear(x, self.weight_VD, None) for x in few])
        else:
            logits_MV = dot_nt(hidden_MD, self.weight_VD)
        if self.bias_V is not None:
            logits_MV += self.bias_V.astype(jnp.float32)[None]
        logits_MV = self.capped(logits_MV)
        return logits_MV if self.masked_V is None else jnp.where(self.masked_V[None], -jnp.inf, logits_MV)

    def capped(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns softcap tanh(scale logits / softcap), without the scale or the softcap if the head has none."""
        logits = logits if self.scale is None else logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def slope(self, logits: Float[Array, "..."]) -> Float[Array, "..."] | None:
        """Returns d capped / d uncapped at these capped logits, or None without a scale and a softcap."""
        if self.softcap is None:
            return None if self.scale is None else jnp.full_like(logits, self.scale)
        slope = 1 - jnp.square(logits / self.softcap)
        slope = slope if self.scale is None else slope * self.scale
        return slope if self.masked_V is None else jnp.where(jnp.isneginf(logits), 0.0, slope)

    def token_rows(self, tokens_C: Int[Array, " C"]) -> Float[Array, "C D"]:
        """Returns the row of each token."""
        return self.weight_VD[tokens_C]

    def rows(self, cut: Callable[[jax.Array], jax.Array]) -> "Head":
        """Returns a head with a part of the rows."""
        bias_V, masked_V = (None if x is None else cut(x) for x in (self.bias_V, self.masked_V))
        return dataclasses.replace(self, weight_VD=cut(self.weight_VD), bias_V=bias_V, masked_V=masked_V)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadWithRows:
    """A frozen head with trainable rows, which replace rows of the head or extend it.

    Attributes:
      frozen: the head, its rows in `ids` masked.
      rows_ND: trainable weights of the tokens `ids`.
      bias_N: frozen biases of these tokens, or None.
    """

    frozen: Head
    rows_ND: Leaf
    bias_N: Leaf
    ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, head: Head, rows_ND: jax.Array, bias_N: jax.Array | None, ids: tuple[int, ...]) -> "HeadWithRows":
        """Returns `head` with these rows for the tokens `ids`."""
        vocabulary = head.weight_VD.shape[0]
        if min(ids) < vocabulary:
            masked_V = jnp.any(one_hot_ids(jnp.arange(vocabulary), ids), axis=1)
            head = dataclasses.replace(head, masked_V=masked_V)
        return cls(head, rows_ND, bias_N, ids)

    def one_hot(self, tokens_M: Int[Array, " M"]) -> Bool[Array, "M N"]:
        """Compares each token with the ids of the trainable rows."""
        return one_hot_ids(tokens_M, self.ids)

    def trained_logits(self, hidden_MD: Float[Array, "M D"]) -> Float[Array, "M N"]:
        """Returns the logits of the trainable rows in f32."""
        with jax.named_scope("new_tokens"):
            logits_MN = row_logits(hidden_MD, self.rows_ND)
        if self.bias_N is not None:
            logits_MN += self.bias_N.astype(jnp.float32)[None]
        return self.frozen.capped(logits_MN)

    def logits(self, hidden_MD: Float[Array, "M D"]) -> Float[Array, "M W"]:
        """Returns all logits in f32, in the order of token ids."""
        logits_MV = self.frozen.logits(hidden_MD)
        beyond = max(0, max(self.ids) + 1 - logits_MV.shape[1])
        logits_MW = jnp.pad(logits_MV, ((0, 0), (0, beyond)))
        return logits_MW.at[:, np.asarray(self.ids)].set(self.trained_logits(hidden_MD))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainableHead:
    """A trainable head without biases: `weight_VD` in f32 or bf16, cast to the hidden states' dtype."""

    weight_VD: Leaf
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})

    def cast(self, dtype: DTypeLike) -> Head:
        """Returns the head in the compute dtype, as a frozen head."""
        return Head(self.weight_VD.astype(dtype), None, self.softcap, scale=self.scale)

    def logits(self, hidden_MD: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """Returns the logits in f32."""
        return self.cast(hidden_MD.dtype).logits(hidden_MD)


def with_codes(head: Head | HeadWithRows | TrainableHead, codes: QTensor | GgmlTensor) -> Head | HeadWithRows:
    """Returns a head whose weight [V, D] is in codes; trainable rows stay as they are."""
    if isinstance(head, TrainableHead):
        return Head(codes, None, head.softcap, scale=head.scale)
    if isinstance(head, HeadWithRows):
        return dataclasses.replace(head, frozen=dataclasses.replace(head.frozen, weight_VD=codes))
    return dataclasses.replace(head, weight_VD=codes)
