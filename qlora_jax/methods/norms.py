"""LayerNorm tuning (Zhao et al., 2024): the weights and biases of norms train."""

from collections.abc import Collection

from qlora_jax.config import LoraArgs
from qlora_jax.methods.method import FINAL_NORM, Given, Method, norm_widths, norms
from qlora_jax.methods.targets import AUTO, target_layers_of
from qlora_jax.models.config import NORM_PLACEMENTS, ModelConfig
from qlora_jax.models.decoder import CausalLM


def norm_targets(config: ModelConfig, spec: LoraArgs) -> list[str]:
    """Returns the norms that train with the method `ln_tuning`, by their Hugging Face names.

    The defaults are all norms of the residual stream: those before and after attention and MLP, and the final one.
    Norms of queries and keys train if `target_modules` names them, as in PEFT.

    Raises:
      ValueError: a pattern that matches nothing, or only some layers of a stack.
    """
    if spec.target_modules != AUTO:
        every = dict.fromkeys(norm_widths(config), tuple(range(config.num_layers)))
        return list(target_layers_of(every, spec, config.num_layers, "norms"))
    residual = (*(f"model.layers.{name}" for name in NORM_PLACEMENTS[config.layout].norms), FINAL_NORM)
    return [config.hugging_face_name(name) for name in residual]


class NormTuning(Method):
    """The method `ln_tuning`."""

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns the norms that train."""
        return norm_targets(config, spec)

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Makes the targeted norms trainable."""
        chosen = norm_targets(model.config, spec)
        for name, norm in norms(model):
            if name in chosen:
                norm.make_trainable()


METHOD = NormTuning()
