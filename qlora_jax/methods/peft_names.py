"""Names of an adapter's targets in PEFT's settings, and the layers that such settings target.

PEFT gives a module an adapter if its name is in target_modules, not in exclude_modules, and its layer in
layers_to_transform. A regular expression or a full name in target_modules holds whatever layers_to_transform says.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.regex import matches_whole, pattern_problems
from qlora_jax.untrusted_json import JsonObject

# The settings in adapter_config.json.
Settings = Mapping[str, Any]
# Modules that have an adapter only in some layers: {name without the layer's index: those layers, ascending}.
SomeLayers = Mapping[str, Sequence[int]]
EVERY_LAYER: SomeLayers = MappingProxyType({})


def linears_of(model: ModelConfig) -> list[str]:
    """Returns the names of a layer's projections in Hugging Face's spelling."""
    return [model.hugging_face_name(f"model.layers.{name}") for name in model.linear_shapes()]


def target_settings(names: Sequence[str], linears: Sequence[str], some_layers: SomeLayers) -> JsonObject:
    """Returns the settings that target these modules, in PEFT and here: target_modules and layers_to_transform.

    If modules have adapters on different layers, each layer's module is named.
    """
    chosen = {tuple(some_layers.get(name, ())) for name in names}
    if len(chosen) == 1:
        (layers,) = chosen
        some = {"layers_to_transform": list(layers)} if layers else {}
        return {"target_modules": target_suffixes(names, linears), **some}
    on_all = target_suffixes([name for name in names if name not in some_layers], linears)
    by_layer = [layer_name(name, layer) for name in names for layer in some_layers.get(name, ())]
    return {"target_modules": [*on_all, *by_layer]}


def target_suffixes(targets: Sequence[str], linears: Sequence[str]) -> list[str]:
    """The shortest suffix of each target's name that matches no linear layer outside `targets`; sorted and unique."""
    others = [name for name in linears if name not in targets]
    suffixes = set()
    for name in targets:
        parts = layer_name(name, 0).split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        suffixes.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(suffixes)


def suffixes_of(names: Iterable[str], model: ModelConfig) -> list[str]:
    """Returns the target_modules that select projections, by our names."""
    return target_suffixes([model.hugging_face_name(name) for name in names], linears_of(model))


def targeted_layers(config: Settings, model: ModelConfig) -> dict[str, list[int]]:
    """Returns {our name: targeted layers} of the projections that an adapter targets only in some layers."""
    found = {}
    for inner in model.linear_shapes():
        name, numbers = f"model.layers.{inner}", model.layers_with(inner)
        modules = {layer: model.hugging_face_name(layer_name(name, layer)) for layer in numbers}
        layers = _by_parameter(config, modules) or layers_of(config, modules)
        if len(layers) < model.num_layers:
            found[name] = layers
    return found


def _by_parameter(config: Settings, modules: Mapping[int, str]) -> list[int]:
    """Returns the layers of a projection whose weight is among the target_parameters."""
    targets = config.get("target_parameters") or ()
    names = {layer: f".{module}.weight" for layer, module in modules.items()}
    return [layer for layer, name in names.items() if any(name.endswith(f".{target}") for target in targets)]


def layers_of(config: Settings, modules: Mapping[int, str]) -> list[int]:
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
