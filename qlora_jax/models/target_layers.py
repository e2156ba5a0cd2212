"""Selects the projections that get an adapter, and the layers of each: target_modules and layers_to_transform.

Layers of a projection are stacked. Names are Hugging Face's without the layer's index; patterns see full names.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from qlora_jax.config import LoraArgs
from qlora_jax.config.layer_numbers import parse_layers
from qlora_jax.metadata import shorten
from qlora_jax.patterns import matches_end, matches_whole, pattern_problems

AUTO, ALL_LINEAR = "auto", "all-linear"
# Methods whose adapters may be on some layers of a stack.
SOME_LAYERS = ("lora", "lora_fa")

Matches = Callable[[str, str], bool]  # (pattern, full name)
Layers = tuple[int, ...]


def target_layers(
    names: Sequence[str], spec: LoraArgs, num_layers: int, kind: str = "linear layers"
) -> dict[str, Layers]:
    """Returns {name: layers with an adapter, ascending} of each targeted projection.

    Args:
      kind: the kind of modules that `names` lists, for messages.

    Raises:
      ValueError: a pattern that matches nothing, a layer that does not exist, or only some layers of a stack with a
        method that does not support it.
    """
    found = _matched_targets(spec.target_modules, names, num_layers, kind)
    if spec.layers_to_transform is not None:
        chosen = parse_layers(spec.layers_to_transform)
        if chosen[-1] >= num_layers:
            raise ValueError(
                f"lora.layers_to_transform: found layer {chosen[-1]}, expected 0 to {num_layers - 1}, the layers of "
                "this model. Correct the number."
            )
        found = {name: tuple(layer for layer in layers if layer in chosen) for name, layers in found.items()}
        found = {name: layers for name, layers in found.items() if layers}
        if not found:
            raise ValueError(
                "lora.layers_to_transform: none of these layers is among those that lora.target_modules names. Correct "
                "the numbers, or name the modules without a layer's index."
            )
    partial = [
        f"{name} ({len(layers)} of {num_layers} layers)" for name, layers in found.items() if len(layers) < num_layers
    ]
    if partial and spec.method not in SOME_LAYERS:
        raise ValueError(
            f"lora.target_modules, lora.layers_to_transform: only some layers of {', '.join(partial)}: layers are "
            f"stacked, so lora.method={spec.method} requires all layers of a projection. Name the projection without a "
            f"layer's index, or set lora.method to {' or '.join(SOME_LAYERS)}."
        )
    return found


def partial_layers(names: Sequence[str], spec: LoraArgs, num_layers: int) -> dict[str, Layers]:
    """Returns the layers of each projection of which only some have an adapter."""
    if spec.method not in SOME_LAYERS:
        return {}
    found = target_layers(names, spec, num_layers)
    return {name: layers for name, layers in found.items() if len(layers) < num_layers}


def targets(spec: LoraArgs, names: Sequence[str], num_layers: int, kind: str = "linear layers") -> list[str]:
    """Returns the targeted projections of a method whose adapters are on all layers.

    Raises:
      ValueError: as `target_layers`.
    """
    return list(target_layers(names, spec, num_layers, kind))


def _matched_targets(
    target_modules: str | Sequence[str], names: Sequence[str], num_layers: int, kind: str
) -> dict[str, Layers]:
    every = {name: tuple(range(num_layers)) for name in names}
    if target_modules in (AUTO, ALL_LINEAR):
        return every
    if isinstance(target_modules, str):
        what = "target_modules (a regular expression for full names; single names are a list, [q_proj, v_proj])"
        return _matched(what, target_modules, matches_whole, every, kind)
    if not target_modules:
        raise ValueError(f"lora.target_modules: the list is empty. Name layers, or set {ALL_LINEAR!r}.")
    found = [_matched("target_modules", re.escape(entry), matches_end, every, kind) for entry in target_modules]
    layers = {name: sorted({layer for one in found for layer in one.get(name, ())}) for name in names}
    return {name: tuple(numbers) for name, numbers in layers.items() if numbers}


def values_by_pattern[Value](
    what: str, patterns: Mapping[str, Value], default: Value, layers_of: Mapping[str, Layers]
) -> dict[str, Value]:
    """Returns {projection: value of the first pattern that matches its adapters, or the default}.

    Raises:
      ValueError: a pattern that matches nothing, or only some of a projection's adapters.
    """
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        for name in whole_stacks(what, pattern, matches_end, layers_of):
            values.setdefault(name, value)
    return {name: values.get(name, default) for name in layers_of}


def whole_stacks(what: str, pattern: str, matches: Matches, layers_of: Mapping[str, Layers]) -> list[str]:
    """Returns the projections whose layers in `layers_of` all match.

    Raises:
      ValueError: a pattern that matches nothing, or only some of a projection's layers.
    """
    matched = _matched(what, pattern, matches, layers_of)
    partial = [
        f"{name} ({len(layers)} of {len(layers_of[name])} layers)"
        for name, layers in matched.items()
        if len(layers) < len(layers_of[name])
    ]
    if partial:
        raise ValueError(
            f"lora.{what}: {pattern!r} matches some layers of {', '.join(partial)}: layers are stacked, so all "
            "adapters of a projection have the same shape and scaling. Name the projection without a layer's index."
        )
    return list(matched)


def _matched(
    what: str, pattern: str, matches: Matches, layers_of: Mapping[str, Layers], kind: str = "linear layers"
) -> dict[str, Layers]:
    """Returns the layers that a pattern matches, of each projection of which it matches some."""
    if problems := pattern_problems(pattern):
        raise ValueError(f"lora.{what}: {shorten(pattern)}: {problems[0]}")
    found = {
        name: tuple(layer for layer in layers if matches(pattern, name.replace(".layers.", f".layers.{layer}.", 1)))
        for name, layers in layers_of.items()
    }
    if not any(found.values()):
        names = ", ".join(layers_of)
        raise ValueError(f"lora.{what}: {pattern!r} matches none of the {kind}: {names}. Correct the name.")
    return {name: layers for name, layers in found.items() if layers}
