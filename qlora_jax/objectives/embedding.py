"""Embeddings: each anchor finds its positive among all texts of the step that are not anchors (Henderson et al. 2017).

The loss is that of sentence-transformers' MultipleNegativesRankingLoss, with 1 / temperature as its scale. The
negatives of an anchor are the positives, and hard negatives, of all rows of the optimizer step. So it depends neither
on micro-batches, nor on packing, nor on the mesh.

Dimension key: A micro-batches, B rows, S slots, K texts of a data row, N data rows of a row, R = A B, D embed.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.objectives.head_objective import HeadObjective
from qlora_jax.objectives.objective import Arrays, Totals

TINY = 1e-12  # the smallest norm by which a state is divided, as torch.nn.functional.normalize has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding(HeadObjective):
    """The cross-entropy of an anchor's positive by cosine similarity / temperature, mean over anchors.

    Attributes:
      sequences_per_row: K: 2 for anchor and positive; 3 with a hard negative.
    """

    row_kind: RowKind = dataclasses.field(default="embedding", init=False)
    is_coupled: bool = dataclasses.field(default=True, init=False)
    sequences_per_row: int = 2
    temperature: float = 0.05

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns an empty dict: texts have no labels."""
        return {}

    def row_losses(self, outputs: Float[Array, "*B S D"], arrays: Arrays, totals: Totals) -> Float[Array, "*B"]:
        """Returns the sum over the anchors of each row, whose candidates are in all rows."""
        texts_RNKD = _by_data_row(normalized(outputs), self.sequences_per_row)
        there_RNK = _by_data_row(arrays[PRESENT][..., None], self.sequences_per_row)[..., 0] > 0
        rows, per_row, _, width = texts_RNKD.shape
        candidates_CD = texts_RNKD[:, :, 1:].reshape(-1, width)
        there_C = there_RNK[:, :, 1:].reshape(-1)
        others = self.sequences_per_row - 1

        @jax.checkpoint  # the similarities of one row at a time, in both passes
        def of_row(row: tuple[jax.Array, ...]) -> Float[Array, ""]:
            index, anchors_ND, there_N = row
            scores_NC = anchors_ND @ candidates_CD.T / self.temperature
            lse_N = jax.nn.logsumexp(jnp.where(there_C[None], scores_NC, -jnp.inf), axis=1)
            own_N = (index * per_row + jnp.arange(per_row, dtype=jnp.int32)) * others
            right_N = jnp.take_along_axis(scores_NC, own_N[:, None], axis=1)[:, 0]
            return jnp.sum(jnp.where(there_N, lse_N - right_N, 0.0))

        indices = jnp.arange(rows, dtype=jnp.int32)
        losses_R = jax.lax.map(of_row, (indices, texts_RNKD[:, :, 0], there_RNK[:, :, 0]))
        return losses_R.reshape(outputs.shape[:-2])

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of anchors."""
        usable = batch[PRESENT].shape[-1] // self.sequences_per_row * self.sequences_per_row
        return jnp.sum(batch[PRESENT][..., : usable : self.sequences_per_row])


def normalized(states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Divides states by their Euclidean norm; 0 stays 0."""
    squares = jnp.sum(states**2, axis=-1, keepdims=True)
    return states * jax.lax.rsqrt(jnp.maximum(squares, TINY**2))


def _by_data_row(slots: Float[Array, "*B S D"], texts: int) -> Float[Array, "R N {texts} D"]:
    """Groups the slots of each row by data row; slots that are too few for a data row are dropped."""
    *rows, count, width = slots.shape
    per_row = count // texts
    return slots[..., : per_row * texts, :].reshape(math.prod(rows), per_row, texts, width)
