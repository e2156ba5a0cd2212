"""Gradient checkpointing: the activations of a layer that the forward pass saves, and those that are recomputed."""

import jax

# Activation memory: the residuals that jax.checkpoint saves per layer besides its input. `none`: all. `names`: results
# of products, so that only norms and activations are recomputed. `full`: nothing. `offload`: nothing, and the layer's
# input is in host memory; its copies overlap with the computation of other layers.
SAVED_NAMES = (
    *("query", "key", "value", "attention_out", "attention_lse", "attention_normed", "attention_residual"),
    *("mlp_gate", "mlp_up", "mlp_normed", "lora_xa", "unscaled", "dora_norms"),
    *("bottleneck_in", "bottleneck_narrow"),
    *("router_logits", "shared_expert_out"),
)
LAYER_INPUT = "layer_input"
REMAT_POLICIES = {
    "none": None,
    "names": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
