"""Selects what gets an adapter, and the layers of each: target_modules, layers_to_transform, target_parameters.

Layers of a projection are stacked. Names are Hugging Face's without the layer's index; patterns see full names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import METHODS, methods_with
from qlora_jax.config.parse import parse_layers
from qlora_jax.models.config import ROUTER, ModelConfig
from qlora_jax.nn.lora import lora_scaling
from qlora_jax.regex import file_pattern_problems, matches_end, matches_whole, pattern_problems
from qlora_jax.untrusted_json import shorten

AUTO, ALL_LINEAR = "auto", "all-linear"

Matches = Callable[[str, str], bool]  # (pattern, full name)
Layers = tuple[int, ...]


def projection_layers(config: ModelConfig) -> dict[str, Layers]:
    """Returns {name: the layers that have it} of each projection that is a plain matrix."""
    return _named_layers(config, config.linear_shapes())


def _named_layers(config: ModelConfig, names: Iterable[str]) -> dict[str, Layers]:
    return {config.hugging_face_name(f"model.layers.{name}"): config.layers_with(name) for name in names}


def target_layers(config: ModelConfig, spec: LoraArgs) -> dict[str, Layers]:
    """Returns {name: layers with an adapter, ascending} of each targeted projection.

    Raises:
      ValueError: as `target_layers_of`.
    """
    return target_layers_of(projection_layers(config), spec, config.num_layers, "linear layers")


def target_parameters(config: ModelConfig, spec: LoraArgs) -> dict[str, Layers]:
    """Returns {name: layers with an adapter, ascending} of each targeted parameter of experts and routers.

    Raises:
      ValueError: a name that matches nothing.
    """
    if not spec.target_parameters:
        return {}
    if config.experts is None:
        raise ValueError(
            f"lora.target_parameters: found {spec.target_parameters}, but the model has no experts. Remove this "
            "setting, and name layers in lora.target_modules."
        )
    every = _named_layers(config, (*config.expert_targets(), ROUTER))
    return _matched_entries("target_parameters", spec.target_parameters, every, "parameters of experts and routers")


def target_layers_of(every: Mapping[str, Layers], spec: LoraArgs, num_layers: int, kind: str) -> dict[str, Layers]:
    """Returns {name: layers with an adapter, ascending} of each targeted module.

    Args:
      every: the layers that have a module, by the names of all modules that can be targets.
      kind: the kind of these modules, for messages.

    Raises:
      ValueError: a pattern that matches nothing, a layer that does not exist, or only some layers of a stack with a
        method that does not support it.
    """
    if spec.target_modules == [] and spec.target_parameters:
        return {}
    found = _matched_targets(spec.target_modules, every, kind)
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
        f"{name} ({len(layers)} of {len(every[name])} layers)"
        for name, layers in found.items()
        if len(layers) < len(every[name])
    ]
    if partial and not METHODS[spec.method].some_layers:
        raise ValueError(
            f"lora.target_modules, lora.layers_to_transform: only some layers of {', '.join(partial)}: layers are "
            f"stacked, so lora.method={spec.method} requires all layers of a projection. Name the projection without a "
            f"layer's index, or set lora.method to {' or '.join(methods_with('some_layers'))}."
        )
    return found


def adapter_layers(config: ModelConfig, spec: LoraArgs) -> dict[str, Layers]:
    """Returns {name: layers with an adapter, ascending} of each targeted projection and parameter.

    Raises:
      ValueError: as `target_layers` and `target_parameters`.
    """
    return target_layers(config, spec) | target_parameters(config, spec)


def some_layers(layers_of: Mapping[str, Layers], num_layers: int) -> dict[str, Layers]:
    """Returns the layers of what has an adapter on some layers of the model only."""
    return {name: layers for name, layers in layers_of.items() if len(layers) < num_layers}


def _matched_targets(target_modules: str | Sequence[str], every: Mapping[str, Layers], kind: str) -> dict[str, Layers]:
    if target_modules in (AUTO, ALL_LINEAR):
        return dict(every)
    if isinstance(target_modules, str):
        what = "target_modules (a regular expression for full names; single names are a list, [q_proj, v_proj])"
        return _matched(what, target_modules, matches_whole, every, kind)
    if not target_modules:
        raise ValueError(f"lora.target_modules: the list is empty. Name layers, or set {ALL_LINEAR!r}.")
    return _matched_entries("target_modules", target_modules, every, kind)


def _matched_entries(setting: str, entries: Sequence[str], every: Mapping[str, Layers], kind: str) -> dict[str, Layers]:
    """Returns, for each module with a match, the layers that any of the names matches."""
    found = [_matched(setting, entry, _is_end, every, kind) for entry in entries]
    layers = {name: sorted({layer for one in found for layer in one.get(name, ())}) for name in every}
    return {name: tuple(numbers) for name, numbers in layers.items() if numbers}


def _is_end(entry: str, name: str) -> bool:
    return matches_end(re.escape(entry), name)


def values_by_pattern[Value](
    what: str, patterns: Mapping[str, Value], default: Value, layers_of: Mapping[str, Layers]
) -> dict[str, Value]:
    """Returns {projection: value of the first pattern that matches its adapters, or the default}.

    Raises:
      ValueError: a pattern that matches nothing, or only some of a projection's adapters.
    """
    if problems := file_pattern_problems({f"lora.{what}": patterns}):
        raise ValueError("\n".join(problems))
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
    """Returns, for each projection with a match, the layers that a pattern matches."""
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


RankAndScaling = tuple[int, float]


def ranks_and_scalings(config: ModelConfig, spec: LoraArgs) -> dict[str, RankAndScaling]:
    """Returns {name: (rank, scaling)} of each targeted projection.

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
