"""A head on whole sequences: pools the hidden states of each sequence, and scores the result with a trained matrix.

Dimension key: B rows, T positions, M = B T, S slots for the sequences of a row, D embed, C outputs.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.nn.variables import TrainedLeaf

Pooling = Literal["last", "mean"]
INIT_STD = 0.02  # for configs without initializer_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The form of a sequence head.

    Attributes:
      outputs: C; 0: no matrix, so that the result is the pooled hidden state.
      pooling: "last": the hidden state of a sequence's last position; "mean": the mean over its positions.
    """

    outputs: int
    pooling: Pooling = "last"


class ScoreMatrix(nnx.Module):
    """The trained matrix `weight` [D, C], in f32; the transpose of `score.weight` in transformers."""

    LEAVES = (TrainedLeaf("weight"),)

    def __init__(self, weight_DC: Float[Array, "D C"]):
        self.weight = nnx.LoRAParam(weight_DC)


class SequenceHead(nnx.Module):
    """Pools each sequence's hidden states, and multiplies them with a trained matrix, if there is one."""

    def __init__(self, spec: HeadSpec, adapter: ScoreMatrix | None):
        self.spec = spec
        self.adapter = nnx.data(adapter)

    @staticmethod
    def init(key: jax.Array, embed_dim: int, spec: HeadSpec, init_std: float = INIT_STD) -> "SequenceHead":
        """Returns a new head, with normal initial values as transformers draws them.

        Args:
          init_std: their standard deviation; `initializer_range` of the model's config.
        """
        if spec.outputs == 0:
            return SequenceHead(spec, None)
        weight_DC = init_std * jax.random.normal(key, (embed_dim, spec.outputs), jnp.float32)
        return SequenceHead(spec, ScoreMatrix(weight_DC))

    def __call__(
        self, hidden_MD: Float[Array, "M D"], sequences_BT: Int[Array, "B T"], slots: int
    ) -> Float[Array, "B S _"]:
        """Returns the outputs [B, S, C] of each slot's sequence in f32, or its pooled state [B, S, D].

        Args:
          hidden_MD: normalized hidden states after the last layer.
          sequences_BT: the slot of the sequence that each position belongs to; `slots` for other positions.
          slots: S. An empty slot's pooled state is 0.
        """
        hidden_BTD = hidden_MD.reshape(*sequences_BT.shape, -1)
        with jax.named_scope("sequence_head"):
            pooled_BSD = POOLINGS[self.spec.pooling](hidden_BTD, sequences_BT, slots)
            return pooled_BSD if self.adapter is None else pooled_BSD @ self.adapter.weight[...].astype(jnp.float32)


def pool_last(hidden_BTD: Float[Array, "B T D"], sequences_BT: Int[Array, "B T"], slots: int) -> Float[Array, "B S D"]:
    """Returns the hidden state of each sequence's last position in f32, and 0 for an empty slot."""
    positions_BT = jnp.broadcast_to(jnp.arange(sequences_BT.shape[1], dtype=jnp.int32), sequences_BT.shape)
    last_BS = jax.vmap(lambda t, s: jax.ops.segment_max(t, s, num_segments=slots))(positions_BT, sequences_BT)
    states_BSD = jnp.take_along_axis(hidden_BTD, jnp.maximum(last_BS, 0)[..., None], axis=1, mode="promise_in_bounds")
    return jnp.where((last_BS >= 0)[..., None], states_BSD.astype(jnp.float32), 0.0)


def pool_mean(hidden_BTD: Float[Array, "B T D"], sequences_BT: Int[Array, "B T"], slots: int) -> Float[Array, "B S D"]:
    """Returns the mean of each sequence's hidden states, summed in f32, and 0 for an empty slot.

    The sums are a product, not a scatter, whose order of additions is not fixed on a GPU.
    """
    is_in_BST = sequences_BT[:, None, :] == jnp.arange(slots, dtype=sequences_BT.dtype)[None, :, None]
    counts_BS = jnp.sum(is_in_BST, axis=2, dtype=jnp.float32)
    sums_BSD = jnp.einsum("bst,btd->bsd", is_in_BST.astype(jnp.float32), hidden_BTD.astype(jnp.float32))
    return sums_BSD / jnp.maximum(counts_BS, 1.0)[..., None]


POOLINGS = {"last": pool_last, "mean": pool_mean}
