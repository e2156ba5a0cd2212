"""The layers of each projection that the settings of a PEFT adapter target."""

from qlora_jax.io.peft.config import AdapterConfig
from qlora_jax.io.tensor_map import layer_name
from qlora_jax.models.config import ModelConfig
from qlora_jax.patterns import matches_whole, pattern_problems


def targeted_layers(config: AdapterConfig, model: ModelConfig) -> dict[str, list[int]]:
    """Returns {our name: targeted layers} of the projections of which an adapter targets only some layers."""
    found = {}
    for inner in model.linear_shapes():
        name = f"model.layers.{inner}"
        modules = [model.hugging_face_name(layer_name(name, layer)) for layer in range(model.num_layers)]
        layers = _layers_of(config, modules)
        if len(layers) < model.num_layers:
            found[name] = layers
    return found


def _layers_of(config: AdapterConfig, modules: list[str]) -> list[int]:
    """Returns the layers of a projection that are targeted; all if the settings do not name layers."""
    target, numbers, every = config.get("target_modules"), config.get("layers_to_transform"), range(len(modules))
    if isinstance(numbers, int):
        numbers = [numbers]
    if numbers:
        return [layer for layer in every if layer in numbers]
    if isinstance(target, str):
        readable = not pattern_problems(target)
        chosen = [layer for layer in every if readable and matches_whole(target, modules[layer])]
    else:
        ends = [f".{entry}" for entry in target if isinstance(entry, str)] if isinstance(target, list) else []
        chosen = [layer for layer in every if any(f".{modules[layer]}".endswith(end) for end in ends)]
    return chosen or list(every)
