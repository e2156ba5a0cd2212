"""A focal loss (Lin et al., 2017), as a package of its own adds it to qlora_jax: sure tokens count less."""

import jax.numpy as jnp

from qlora_jax.nn.lm_head.cross_entropy import token_nll
from qlora_jax.objectives.function_objective import loss_declaration


def focal(model, hidden_MD, micro):
    targets, weights = micro["targets"], micro["weights"]
    nll_M = token_nll(hidden_MD, model.head, targets.reshape(-1), weights.reshape(-1) > 0)
    nll_BT = nll_M.reshape(targets.shape)
    return jnp.sum((1 - jnp.exp(-nll_BT)) ** 2 * nll_BT * weights, axis=1)


DECLARATION = loss_declaration(focal)
