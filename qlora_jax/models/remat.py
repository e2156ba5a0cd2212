"""Gradient checkpointing: the activations of a layer that the forward pass saves, and those that are recomputed."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx

SAVED_NAMES = (
    *("query", "key", "value", "attention_out", "attention_lse", "attention_normed", "attention_residual"),
    *("mlp_gate", "mlp_up", "mlp_normed", "router_logits", "shared_expert_out"),
)
LAYER_INPUT = "layer_input"
ATTENTION = (
    "attention_out",
    "attention_lse",
)  # results that attention's backward pass reads besides queries, keys and values

Policy = Any  # a policy of jax.checkpoint, for which JAX has no type


def _in_host_memory(*names: str) -> Policy:
    """Returns the policy that saves these names alone, in host memory."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*names],
        offload_src="device",
        offload_dst="pinned_host",
    )


# Activation memory: the residuals that jax.checkpoint saves per layer besides its input. `none`: all. `names`: results
# of products, so that only norms and activations are recomputed. `attention`: its result, so that attention, whose time
# grows with the square of a row's length, runs once. `full`: nothing. `offload`: nothing, and the layer's input is in
# host memory; its copies overlap with the computation of other layers. `offload_attention`: as `attention`, in host
# memory. Given the adapters' own names.
REMAT_POLICIES: Mapping[str, Callable[[Collection[str]], Policy | None]] = {
    "none": lambda own: None,
    "names": lambda own: jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES, *own),
    "attention": lambda own: jax.checkpoint_policies.save_only_these_names(*ATTENTION),
    "full": lambda own: jax.checkpoint_policies.nothing_saveable,
    "offload": lambda own: _in_host_memory(LAYER_INPUT),
    "offload_attention": lambda own: _in_host_memory(LAYER_INPUT, *ATTENTION),
}
RECOMPUTES_PRODUCTS = frozenset({"attention", "full", "offload", "offload_attention"})
OFFLOADS = frozenset({"offload", "offload_attention"})


def remat_policy(remat: str, layers: nnx.Module) -> Policy | None:
    """Returns the policy of a key of REMAT_POLICIES, for layers whose adapters list what they save; None: save all."""
    own = {name for _, node in nnx.iter_graph(layers) for name in getattr(node, "SAVED", ())}
    return REMAT_POLICIES[remat](sorted(own))
