"""Gradient checkpointing: the activations of a layer that the forward pass saves, and those that are recomputed."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

ATTENTION = ("attention_out", "attention_lse")  # read by attention's backward pass besides queries, keys and values
SAVED_NAMES = (
    *("query", "key", "value", *ATTENTION, "attention_normed", "attention_residual"),
    *("mlp_gate", "mlp_up", "mlp_normed", "router_logits", "shared_expert_out"),
)

LAYER_INPUT = "layer_input"

Policy = Any  # a policy of jax.checkpoint, for which JAX has no type


class Residuals(NamedTuple):
    """The values that a layer saves for the backward pass besides its input.

    Attributes:
      names: of `checkpoint_name`; None: everything.
      on_host: these and the layer's input are in host memory; their copies overlap with other layers' computation.
    """

    names: tuple[str, ...] | None
    on_host: bool = False

    @property
    def recomputes_products(self) -> bool:
        """True if the backward pass repeats the products of a layer."""
        return self.names is not None and not {"mlp_gate", "mlp_up"} & {*self.names}

    def policy(self, own: Collection[str]) -> Policy | None:
        """Returns the policy; None: save all. With the results of products it saves those of the adapters, `own`."""
        if self.names is None:
            return None
        names = self.names if self.recomputes_products else (*self.names, *own)
        if not self.on_host:
            return jax.checkpoint_policies.save_only_these_names(*names)
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT, *names],
            offload_src="device",
            offload_dst="pinned_host",
        )


# `names`: results of products, so that only norms and activations are recomputed. `attention`: its result, so that its
# forward pass, whose time grows with the square of a row's length, runs once.
REMAT_POLICIES: Mapping[str, Residuals] = {
    "none": Residuals(None),
    "names": Residuals(SAVED_NAMES),
    "attention": Residuals(ATTENTION),
    "full": Residuals(()),
    "offload": Residuals((), on_host=True),
    "offload_attention": Residuals(ATTENTION, on_host=True),
}


def remat_policy(remat: str, layers: nnx.Module) -> Policy | None:
    """Returns the policy of a key of REMAT_POLICIES, for layers whose adapters list what they save; None: save all."""
    own = {name for _, node in nnx.iter_graph(layers) for name in getattr(node, "SAVED", ())}
    return REMAT_POLICIES[remat].policy(sorted(own))
