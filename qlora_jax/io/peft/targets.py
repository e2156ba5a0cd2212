"""The layers of each projection that the settings of a PEFT adapter target.

PEFT gives a module an adapter if its name is in target_modules, not in exclude_modules, and its layer in
layers_to_transform. A regular expression or a full name in target_modules holds whatever layers_to_transform says.
"""

from collections.abc import Mapping

from qlora_jax.io.peft.config import AdapterConfig
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.regex import matches_whole, pattern_problems


def targeted_layers(config: AdapterConfig, model: ModelConfig) -> dict[str, list[int]]:
    """Returns {our name: targeted layers} of the projections that an adapter targets only in some layers."""
    found = {}
    for inner in model.linear_shapes():
        name, numbers = f"model.layers.{inner}", model.layers_with(inner)
        modules = {layer: model.hugging_face_name(layer_name(name, layer)) for layer in numbers}
        layers = _by_parameter(config, modules) or layers_of(config, modules)
        if len(layers) < model.num_layers:
            found[name] = layers
    return found


def _by_parameter(config: AdapterConfig, modules: Mapping[int, str]) -> list[int]:
    """Returns the layers of a projection whose weight is among the target_parameters."""
    targets = config.get("target_parameters") or ()
    names = {layer: f".{module}.weight" for layer, module in modules.items()}
    return [layer for layer, name in names.items() if any(name.endswith(f".{target}") for target in targets)]


def layers_of(config: AdapterConfig, modules: Mapping[int, str]) -> list[int]:
    """Returns the layers of a projection that are targeted.

    If target_modules names none of the modules in a way that can be read, all count as named: the tensors then show
    which ones are targets.

    Args:
      modules: Hugging Face's name of the projection in each layer that has it.
    """
    target, excluded = config.get("target_modules"), config.get("exclude_modules")
    named = [layer for layer, module in modules.items() if _names(target, module)] or list(modules)
    numbers = None if isinstance(target, str) else config.get("layers_to_transform")
    if isinstance(numbers, int):
        numbers = [numbers]
    return [
        layer
        for layer in named
        if not _names(excluded, modules[layer]) and (not numbers or layer in numbers or _has(target, modules[layer]))
    ]


def _names(setting: object, module: str) -> bool:
    """Returns True if a regular expression matches a module's whole name, or an entry of a list is its end."""
    if isinstance(setting, str):
        return not pattern_problems(setting) and matches_whole(setting, module)
    entries = setting if isinstance(setting, list) else []
    return any(isinstance(entry, str) and f".{module}".endswith(f".{entry}") for entry in entries)


def _has(setting: object, module: str) -> bool:
    return isinstance(setting, list) and module in setting
