"""Declares the settings of router losses, for mixtures of experts."""

import dataclasses

from qlora_jax.config.fields import NON_NEGATIVE, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterArgs:
    """Losses of the routers of a mixture of experts (docs/training.md)."""

    aux_loss_coef: float = setting(
        "factor of the load-balancing loss, as router_aux_loss_coef in transformers, such as 0.001; 0: no such loss",
        0.0,
        NON_NEGATIVE,
    )
    z_loss_coef: float = setting(
        "factor of the router z-loss, the mean of logsumexp(logits)^2, such as 0.001; 0: no such loss",
        0.0,
        NON_NEGATIVE,
    )
