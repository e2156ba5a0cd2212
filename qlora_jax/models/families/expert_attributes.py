"""Reads the attributes of mixtures of experts that configs of several families share."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.experts_config import MAX_EXPERTS, ExpertsConfig
from qlora_jax.models.families.attributes import Attributes, NotNegative
from qlora_jax.nn.router import BEST_OF_GROUP

# Names of the number of experts in configs of mixtures.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# transformers' default of it, by model_type.
DEFAULT_COUNTS = {
    **{"mixtral": 8, "qwen2_moe": 60, "qwen3_moe": 128, "olmoe": 64, "glm4_moe": 128, "gpt_oss": 128},
    **{"qwen3_vl_moe_text": 60, "glm4v_moe_text": 128},
}


def expert_count(config: Mapping[str, object]) -> int:
    """Returns the number of experts per layer; 0 for a dense model, or a number that `model_config` refuses."""
    stated = (config.get(name) for name in COUNTS)
    default = DEFAULT_COUNTS.get(str(config.get("model_type")), 0)
    count = next((each for each in stated if each is not None), default)
    return count if isinstance(count, int) and 0 < count <= MAX_EXPERTS else 0


def experts_from_hf(
    attributes: Attributes, layers: tuple[int, ...], count: int, per_token: int, **features: Any
) -> ExpertsConfig | None:
    """Returns the experts of the sparse layers, or None without sparse layers.

    Args:
      per_token: default of `num_experts_per_tok`.
      features: further fields of Experts.
    """
    experts = ExpertsConfig(
        count=count, per_token=attributes.integer("num_experts_per_tok", per_token), layers=layers, **features
    )
    if experts.per_token > count:
        attributes.refuse(f"num_experts_per_tok: found {experts.per_token}, expected at most {count}, the experts")
    _check_groups(attributes, experts)
    return experts if layers else None


def _check_groups(attributes: Attributes, experts: ExpertsConfig) -> None:
    """Checks that groups are equal, and that the chosen ones have enough experts."""
    groups, best = experts.groups, experts.groups_per_token
    if not groups or experts.count % groups or (groups > 1 and experts.count // groups < BEST_OF_GROUP):
        attributes.refuse(
            f"n_group: found {groups}, expected a number that divides {experts.count} experts into groups of at least "
            f"{BEST_OF_GROUP}"
        )
    elif best > groups or best * (experts.count // groups) < experts.per_token:
        attributes.refuse(
            f"topk_group: found {best} of {groups} groups, expected enough for {experts.per_token} experts"
        )


def sparse_layers(attributes: Attributes) -> tuple[int, ...]:
    """Returns the sparse layers of Qwen models: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
    layers, step = attributes.integer("num_hidden_layers"), attributes.integer("decoder_sparse_step", 1) or 1
    dense = set(attributes.numbers("mlp_only_layers", NotNegative))
    return tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
