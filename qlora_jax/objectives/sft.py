"""Supervised finetuning: the mean cross-entropy of all supervised tokens."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import RowKind
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.lm_head.cross_entropy import token_nll
from qlora_jax.objectives.objective import Arrays, Totals


@dataclasses.dataclass(frozen=True)
class SFT:
    """-log p(token), averaged over the supervised tokens of a step. Its outputs are the losses of rows."""

    row_kind: RowKind = "text"
    sequences_per_row: int = 0
    kl_pairs: bool = False
    is_coupled: bool = False

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns an empty dict: a row has only ids and weights."""
        return {}

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> Float[Array, " B"]:
        """Returns each row's sum of weight * -log p(target), in f32."""
        targets_BT, weights_BT = micro["targets"], micro["weights"]
        with jax.named_scope("head"):
            nll_M = token_nll(hidden_MD, model.head, targets_BT.reshape(-1), weights_BT.reshape(-1) > 0)
        return jnp.sum(nll_M.reshape(weights_BT.shape) * weights_BT, axis=1)

    def totals(self, batch: Arrays) -> Totals:
        """Returns an empty dict: losses need no sums over the step."""
        return {}

    def row_losses(self, outputs: Float[Array, "*AB"], arrays: Arrays, totals: Totals) -> Float[Array, "*AB"]:
        """Returns the outputs."""
        return outputs

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of supervised tokens."""
        return jnp.sum(batch["weights"])


SUPERVISED = SFT()
