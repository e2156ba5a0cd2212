"""Distillation: the divergence of a model from a teacher, of which the likeliest tokens of each position are known.

All other tokens are one more outcome, the tail. With the probabilities p of the model and q of the teacher for these
K + 1 outcomes, the loss of a token is the generalized Jensen-Shannon divergence (Agarwal et al. 2024, GKD)

  J = beta KL(q || m) + (1 - beta) KL(p || m),    m = (1 - beta) p + beta q

and its limits, scaled as in TRL, are KL(q || p) for beta 0 and KL(p || q) for beta 1. With K the vocabulary, J is that
of the whole distributions; merging outcomes never makes it larger.

Dimension key: A micro-batches, B rows, T positions, M = B T, K the teacher's tokens, L = K + 1, D embed.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objectives import RowKind
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.lm_head.chosen_tokens import chosen_logits
from qlora_jax.nn.lm_head.sharded_vocabulary import at_temperature
from qlora_jax.objectives.objective import Arrays, TokenValue, Totals
from qlora_jax.objectives.policy_gradient import SAMPLER_LOGPS

TEACHER_IDS, TEACHER_LOGPS = "teacher_ids", "teacher_logps"  # per token, [K] and [L]; the last log p is the tail's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistilledRows:
    """Sums over the supervised tokens of rows, and log-probabilities of these tokens.

    Attributes:
      divergence_B: of J, in nats.
      nll_B: of -log p(target) at the temperature of the objective, in nats.
      tail_B: of the teacher's probability of the tail.
      logps_BT: log p(target) of each token at the temperature of the objective, 0 elsewhere.
    """

    divergence_B: Float[Array, "*A B"]
    nll_B: Float[Array, "*A B"]
    tail_B: Float[Array, "*A B"]
    logps_BT: Float[Array, "*A B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """J, averaged over the supervised tokens of a step.

    Attributes:
      row_kind: "text" learns the tokens of the data, "prompt" those of sampled replies.
      sequences_per_row: replies to each prompt.
      count_of_tokens: K.
      has_tail: False normalizes both models over the K tokens.
      sampler_temperature: that with which replies were sampled.
    """

    row_kind: RowKind = "text"
    sequences_per_row: int = 0
    beta: float = 0.0
    temperature: float = 1.0
    count_of_tokens: int = 64
    has_tail: bool = True
    sampler_temperature: float = 1.0
    kl_pairs: bool = dataclasses.field(default=False, init=False)
    is_coupled: bool = dataclasses.field(default=False, init=False)

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """Returns an empty dict: a row has only ids, weights and what the teacher predicts."""
        return {}

    @property
    def token_values(self) -> Mapping[str, TokenValue]:
        """Returns the arrays per token that the outputs read."""
        count = self.count_of_tokens
        sampled = {SAMPLER_LOGPS: TokenValue()} if self.row_kind == "prompt" else {}
        return sampled | {TEACHER_IDS: TokenValue((count,), "int32"), TEACHER_LOGPS: TokenValue((count + 1,))}

    def outputs(self, model: CausalLM, hidden_MD: Float[Array, "M D"], micro: Arrays) -> DistilledRows:
        """Returns the sums of a micro-batch's rows."""
        weights_BT, targets_M1 = micro["weights"], micro["targets"].reshape(-1, 1)
        ids_MK, log_q_ML = (micro[name].reshape(len(targets_M1), -1) for name in (TEACHER_IDS, TEACHER_LOGPS))
        with jax.named_scope("head"):
            head, asked_ML = at_temperature(model.head, self.temperature), jnp.concatenate([targets_M1, ids_MK], axis=1)
            found = chosen_logits(hidden_MD, head, asked_ML, weights_BT.reshape(-1) > 0)
        target_M, known_MK = found.chosen_MK[:, 0], found.chosen_MK[:, 1:]
        is_known_M = jnp.any(ids_MK == targets_M1, axis=1)
        tail_M = jnp.where(is_known_M, found.rest_M, jnp.logaddexp(found.rest_M, target_M))
        logits_ML = jnp.concatenate([known_MK, tail_M[:, None]], axis=1)
        lse_M1 = jax.nn.logsumexp(logits_ML, axis=1, keepdims=True)
        each = self.divergence(logits_ML - lse_M1, log_q_ML), lse_M1[:, 0] - target_M, jnp.exp(log_q_ML[:, -1])
        divergence_BT, nll_BT, tail_BT = (one.reshape(weights_BT.shape) * weights_BT for one in each)
        divergence_B, nll_B, tail_B = (jnp.sum(one, axis=1) for one in (divergence_BT, nll_BT, tail_BT))
        return DistilledRows(divergence_B=divergence_B, nll_B=nll_B, tail_B=tail_B, logps_BT=-nll_BT)

    def divergence(self, log_p_ML: Float[Array, "M L"], log_q_ML: Float[Array, "M L"]) -> Float[Array, " M"]:
        """Returns J of each token from the log-probabilities of model and teacher."""
        if not self.has_tail:
            log_p_ML, log_q_ML = (jax.nn.log_softmax(each[:, :-1]) for each in (log_p_ML, log_q_ML))
        there_ML = log_q_ML > -jnp.inf  # an outcome without tokens has p = q = 0
        log_p_ML, log_q_ML = (jnp.where(there_ML, each, 0.0) for each in (log_p_ML, log_q_ML))
        p_ML, q_ML = (jnp.where(there_ML, jnp.exp(each), 0.0) for each in (log_p_ML, log_q_ML))
        if self.beta == 0.0:
            return jnp.sum(q_ML * (log_q_ML - log_p_ML), axis=1)
        if self.beta == 1.0:
            return jnp.sum(p_ML * (log_p_ML - log_q_ML), axis=1)
        log_m_ML = jnp.logaddexp(log_p_ML + math.log1p(-self.beta), log_q_ML + math.log(self.beta))
        of_teacher_ML = self.beta * q_ML * (log_q_ML - log_m_ML)
        return jnp.sum(of_teacher_ML + (1 - self.beta) * p_ML * (log_p_ML - log_m_ML), axis=1)

    def totals(self, batch: Arrays) -> Totals:
        """Returns an empty dict: losses need no sums over the step."""
        return {}

    def row_losses(self, outputs: DistilledRows, arrays: Arrays, totals: Totals) -> Float[Array, "*AB"]:
        """Returns the divergence of each row."""
        return outputs.divergence_B

    def count(self, batch: Arrays) -> Float[Array, ""]:
        """Returns the number of supervised tokens."""
        return jnp.sum(batch["weights"])
