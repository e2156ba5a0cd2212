"""Ranks and scalings of low-rank adapters, by lora.rank, lora.alpha and their patterns."""

from qlora_jax.config import LoraArgs
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.target_layers import target_layers, target_parameters, values_by_pattern
from qlora_jax.nn.adapters.lora import lora_scaling

RankAndScaling = tuple[int, float]


def ranks_and_scalings(config: ModelConfig, spec: LoraArgs) -> dict[str, RankAndScaling]:
    """Returns {name: (rank, scaling)} of each targeted projection, for LoRA and DoRA.

    Raises:
      ValueError: a pattern that matches nothing or only some of a projection's adapters, or a rank below 1.
    """
    every = _of_all_targets(config, spec)
    return {name: every[name] for name in target_layers(config, spec)}


def parameter_ranks_and_scalings(config: ModelConfig, spec: LoraArgs) -> dict[str, RankAndScaling]:
    """Returns {name: (rank, scaling)} of each targeted parameter of experts and routers.

    Raises:
      ValueError: as `ranks_and_scalings`.
    """
    every = _of_all_targets(config, spec)
    return {name: every[name] for name in target_parameters(config, spec)}


def _of_all_targets(config: ModelConfig, spec: LoraArgs) -> dict[str, RankAndScaling]:
    layers_of = target_layers(config, spec) | target_parameters(config, spec)
    ranks = values_by_pattern("rank_pattern", spec.rank_pattern, spec.rank, layers_of)
    alphas = values_by_pattern("alpha_pattern", spec.alpha_pattern, spec.alpha, layers_of)
    if wrong := [f"{rank} for {name}" for name, rank in ranks.items() if rank < 1]:
        raise ValueError(f"lora.rank_pattern: found rank {', '.join(wrong)}, expected at least 1.")
    return {name: (ranks[name], lora_scaling(ranks[name], alphas[name], spec.use_rslora)) for name in layers_of}
