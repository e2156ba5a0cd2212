"""Policy gradients from the rewards of sampled replies: GRPO (Shao et al. 2024) and its relatives.

p, p_old and q are the probabilities of a token under the model, the model that drew it, and the reference. With
r = p / p_old and the advantage A of a reply, the loss of a step is the mean over its replies of
scale sum_t (w l + beta k), where

  clip   l = -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
  cispo  l = -min(r, epsilon_high) A log p, with a ratio that has no gradient    (MiniMax 2025)
  k      = r (q / p - log(q / p) - 1), or without r                              (Schulman 2020)

The scale of each reply (rollouts/advantages.py) makes this the mean over tokens, or over replies, that a loss type
defines. At level "sequence", r is the geometric mean over a reply (GSPO, Zheng et al. 2025). w is 1, or the truncated
ratio of p_old to the sampler's probability. All probabilities are those of logits divided by the temperature.

Dimension key: A micro-batches, B rows per micro-batch, S slots, T positions, M = B T, D embed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import RowKind
from qlora_jax.data.batching.packing import PRESENT
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.lm_head.cross_entropy import token_nll_and_entropy
from qlora_jax.nn.lm_head.sharded_vocabulary import at_temperature
from qlora_jax.objectives.objective import Arrays, TokenValue, Totals
from qlora_jax.objectives.sequences import per_token, spread_to_tokens, sum_by_slot

ADVANTAGES, TOKEN_SCALE = "advantages", "token_scale"  # per slot
OLD_LOGPS, REFERENCE_LOGPS, SAMPLER_LOGPS = "old_logps", "reference_logps", "sampler_logps"  # per token

Correction = Literal["token_truncate", "sequence_mask"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyOutputs:
    """Scores of the tokens of replies; 0 elsewhere, and for replies that do not train.

    Attributes:
      logps_BT: log p(token), in nats, at the temperature of the objective.
      entropy_BT: entropy of the prediction of the token, in nats, without gradient.
    """

    logps_BT: Float[Array, "*A B T"]
    entropy_BT: Float[Array, "*A B T"]


class TokenTerms(NamedTuple):
    """The parts of the loss of each token.

    Fields:
      losses_BT: w l + beta k.
      ratios_BT: r, at most delta; that of its reply at level "sequence".
      kl_BT: k; None without reference.
    """

    losses_BT: Float[Array, "*A B T"]
    ratios_BT: Float[Array, "*A B T"]
    kl_BT: Float[Array, "*A B T"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """The mean over sampled replies; the replies to one prompt are the branches of a row.

    Attributes:
      sequences_per_row: replies to each prompt.
      stored_old: True if p_old is in the batch; False if it is p, whose ratio is 1.
      correction: the weights w, at most `correction_max`; None: all 1.
    """

    sequences_per_row: int = 8
    loss: Literal["clip", "cispo"] = "clip"
    level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    bias_corrected_kl: bool = True
    temperature: float = 1.0
    correction: Correction | None = None
    correction_max: float = 3.0
    stored_old: bool = False
    row_kind: RowKind = dataclasses.field(default="prompt", init=False)
    kl_pairs: bool = dataclasses.field(default=False, init=False)
    is_coupled: bool = dataclasses.field(default=False, init=False)

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the advantage of each reply, and the scale of its loss."""
        return {ADVANTAGES: (), TOKEN_SCALE: ()}

    @property
    def token_values(self) -> Mapping[str, TokenValue]:
        """Returns the arrays per token that the loss and its metrics read: log p of other models."""
        old, reference = (OLD_LOGPS,) * self.stored_old, (REFERENCE_LOGPS,) * (self.beta > 0)
        return dict.fromkeys((*old, *reference, SAMPLER_LOGPS), TokenValue())

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> PolicyOutputs:
        """Returns the scores of a micro-batch's tokens, which need none of the values."""
        shape = micro["weights"].shape
        with jax.named_scope("head"):
            head, wanted_M = at_temperature(model.head, self.temperature), micro["weights"].reshape(-1) > 0
            nll_M, entropy_M = token_nll_and_entropy(hidden_MD, head, micro["targets"].reshape(-1), wanted_M)
        return PolicyOutputs(-nll_M.reshape(shape), entropy_M.reshape(shape))

    def totals(self, batch: Arrays) -> Totals:
        """Returns an empty dict: losses need no sums over the step."""
        return {}

    def row_losses(self, outputs: PolicyOutputs, arrays: Arrays, totals: Totals) -> Float[Array, "*AB"]:
        """Returns the sum of each row's replies."""
        losses_BT = self.token_terms(outputs, arrays).losses_BT * arrays["weights"]
        losses_BS = sum_by_slot(losses_BT, arrays["sequences"], arrays[PRESENT].shape[-1])
        return jnp.sum(losses_BS * arrays[TOKEN_SCALE] * arrays[PRESENT], axis=-1)

    def token_terms(self, outputs: PolicyOutputs, arrays: Arrays) -> TokenTerms:
        """Returns the parts of each token's loss."""
        logps_BT = outputs.logps_BT
        ratios_BT = jnp.exp(self._over_replies(self._above(logps_BT, self.old_logps(outputs, arrays), arrays), arrays))
        kl_BT = None
        if self.beta > 0:
            above_BT = self._above(logps_BT, arrays[REFERENCE_LOGPS], arrays)
            kl_BT = (jnp.expm1(-above_BT) + above_BT) * (ratios_BT if self.bias_corrected_kl else 1.0)
        advantages_BT = spread_to_tokens(arrays[ADVANTAGES], arrays["sequences"])
        if self.loss == "cispo":
            truncated_BT = jnp.minimum(jax.lax.stop_gradient(ratios_BT), self.epsilon_high)
            losses_BT = -truncated_BT * advantages_BT * logps_BT
        else:
            clipped_BT = jnp.clip(ratios_BT, 1 - self.epsilon, 1 + self.epsilon_high)
            ratios_BT = ratios_BT if self.delta is None else jnp.minimum(ratios_BT, self.delta)
            losses_BT = -jnp.minimum(ratios_BT * advantages_BT, clipped_BT * advantages_BT)
        if self.correction is not None:
            losses_BT = losses_BT * self._corrections(outputs, arrays)
        return TokenTerms(losses_BT if kl_BT is None else losses_BT + self.beta * kl_BT, ratios_BT, kl_BT)

    def old_logps(self, outputs: PolicyOutputs, arrays: Arrays) -> Float[Array, "*A B T"]:
        """Returns log p_old, without gradient."""
        return arrays[OLD_LOGPS] if self.stored_old else jax.lax.stop_gradient(outputs.logps_BT)

    def _above(self, ours_BT: jax.Array, others_BT: jax.Array, arrays: Arrays) -> Float[Array, "*A B T"]:
        """Returns the difference for tokens that train, 0 for others."""
        return jnp.where(arrays["weights"] > 0, ours_BT - others_BT, 0.0)

    def _over_replies(self, differences_BT: jax.Array, arrays: Arrays) -> Float[Array, "*A B T"]:
        """Returns the mean over each reply at level "sequence", otherwise the differences themselves."""
        if self.level == "token":
            return differences_BT
        sequences_BT, slots = arrays["sequences"], arrays[PRESENT].shape[-1]
        sums_BS, tokens_BS = (sum_by_slot(each, sequences_BT, slots) for each in (differences_BT, arrays["weights"]))
        return spread_to_tokens(per_token(sums_BS, tokens_BS), sequences_BT)

    def _corrections(self, outputs: PolicyOutputs, arrays: Arrays) -> Float[Array, "*A B T"]:
        """Returns the weights w, without gradient."""
        above_BT = self._above(self.old_logps(outputs, arrays), arrays[SAMPLER_LOGPS], arrays)
        if self.correction == "token_truncate":
            return jnp.minimum(jnp.exp(above_BT), self.correction_max)
        ratios_BS = jnp.exp(sum_by_slot(above_BT, arrays["sequences"], arrays[PRESENT].shape[-1]))
        return spread_to_tokens(jnp.where(ratios_BS <= self.correction_max, ratios_BS, 0.0), arrays["sequences"])

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of replies."""
        return jnp.sum(batch[PRESENT])
