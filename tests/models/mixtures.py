"""Tiny mixtures of experts with random weights, and their arrays by transformers' names of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.tensor_names import layer_name

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
)
NARROW = SIZES | dict(moe_intermediate_size=24)  # families whose experts have a separate width
EXPERT_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Arrays = dict[str, np.ndarray]


DENSE = WeightFormat(quant_type=None, dtype="float32")


def random_mixture(config: dict[str, object], lora: LoraArgs, weights: WeightFormat = DENSE) -> ModelParts:
    """Returns a model whose base and adapters are all random, none of them zero."""
    features, rng = model_config(config), np.random.default_rng(0)

    def shapes() -> ModelParts:
        model = CausalLM(features, weights)
        attach_method(model, lora, jax.random.key(0))
        return partition(model)

    return jax.tree_util.tree_map_with_path(lambda path, leaf: _random(rng, path, leaf), jax.eval_shape(shapes))


def _random(rng: np.random.Generator, path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == jnp.uint8:
        return jnp.asarray(rng.integers(0, 256, leaf.shape, "u1"))
    name = jax.tree_util.keystr(path)
    around, width = (1.0, 0.3) if "norm" in name else (0.0, 0.3 if "bias" in name else 0.12)
    values = around + width * rng.standard_normal(leaf.shape, "f4")
    return jnp.asarray(np.abs(values) if "nested" in name else values, leaf.dtype)


def arrays_of(parts: ModelParts, config: ModelConfig) -> Arrays:
    """Returns the parameters of transformers' model with the adapters merged; gate and up of experts are fused."""
    base = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(parts.base)}
    experts = "model.layers.mlp.experts."
    if f"{experts}gate_proj.weight" in base:
        halves = [base.pop(f"{experts}{name}.weight") for name in ("gate_proj", "up_proj")]
        base[f"{experts}gate_up_proj"] = np.concatenate(halves, axis=2)
        base[f"{experts}down_proj"] = base.pop(f"{experts}down_proj.weight")
    for name, leaves in parts.lora.items():
        target = name if name in base else f"{name}.weight"
        base[target] = base[target] + np.swapaxes(
            2.0 * np.asarray(leaves["lora_a"]) @ np.asarray(leaves["lora_b"]), -1, -2
        )
    if config.tie_embeddings:
        base["lm_head.weight"] = base["model.embed_tokens.weight"]
    return {key: value for name, stack in base.items() for key, value in _by_layer(name, stack, config).items()}


def _by_layer(name: str, stack: np.ndarray, config: ModelConfig) -> Arrays:
    if ".layers." not in name:
        return {name: stack}
    layers = config.layers_with(name.removeprefix("model.layers."))
    named = {config.hugging_face_name(layer_name(name, layer)): each for layer, each in zip(layers, stack, strict=True)}
    return named
