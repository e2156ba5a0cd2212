"""Adapters that PEFT attaches to parameters and not to modules (target_parameters): routed experts and routers.

In transformers 5 the experts of a layer are two parameters, `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`.
PEFT stores an adapter of all experts as two matrices, and names it after the module of the parameter. If both
parameters have an adapter, that of `gate_up_proj` is within that of `down_proj`, as `base_layer`.

Dimension key: S sparse layers, E experts, K in, R rank, N out.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qlora_jax.methods.peft_form import PREFIX, TrainedAdapter
from qlora_jax.methods.peft_names import Settings
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ROUTER, ModelConfig
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.regex import matches_end

LayersOf = Mapping[str, Sequence[int]]  # {Hugging Face name without the layer's index: layers with an adapter}

# For mixtures, PEFT takes a target_modules entry with one of these ends for the experts or the router, so that the
# weights of other modules of these names have to be target_parameters.
TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")
NESTED = "base_layer"
TENSORS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def expert_parameters(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns {Hugging Face name: (N, K) of one expert} of the parameters of experts, in PEFT's order."""
    return {model.hugging_face_name(f"model.layers.{name}"): shape for name, shape in model.expert_targets().items()}


def target_entries(adapter: TrainedAdapter) -> dict[str, list[str]]:
    """Returns the target_parameters of the modules that PEFT does not find in target_modules, by module.

    An entry has a layer's index if only some of the layers with this module have an adapter.
    """
    layers_of, model = adapter.layers_of, adapter.model
    return {name: _entries(name, layers_of[name], model) for name in adapter.lora if _is_parameter(name, model)}


def entries_of(names: Iterable[str], layers_of: LayersOf, model: ModelConfig) -> list[str]:
    """Returns the setting lora.target_parameters that selects these experts and routers, by Hugging Face's names."""
    return sorted(entry.removesuffix(".weight") for name in names for entry in _entries(name, layers_of[name], model))


def own_patterns(
    config: Settings, ranks: Mapping[str, int], layers_of: LayersOf, model: ModelConfig
) -> tuple[dict[str, int], dict[str, float]]:
    """Returns (rank_pattern, alpha_pattern) that give each module of an adapter its rank and alpha in PEFT.

    PEFT matches its patterns with names of parameters, which end in `.weight` for most modules.

    Args:
      ranks: rank by Hugging Face's name of the module.
    """
    targets, patterns = config.get("target_parameters") or (), config.get("alpha_pattern") or {}
    alphas = {}
    for name in ranks:
        layers = layers_of.get(name) or model.layers_with(_our_name(name, model))
        module = layer_name(name, layers[0])
        parameter = _parameter(module, name, model)
        known = parameter if any(f".{parameter}".endswith(f".{target}") for target in targets) else module
        alphas[name] = next((alpha for pattern, alpha in patterns.items() if matches_end(pattern, known)), None)
    return (
        {re.escape(name): rank for name, rank in _with_any_layer(ranks).items() if rank != config.get("r")},
        {re.escape(name): alpha for name, alpha in _with_any_layer(alphas).items() if alpha is not None},
    )


def _with_any_layer[Value](values: Mapping[str, Value]) -> dict[str, Value]:
    """Returns values by the part of a name that follows the layer's index."""
    return {name.partition(".layers.")[2]: value for name, value in values.items()}


def _is_parameter(name: str, model: ModelConfig) -> bool:
    if model.experts is None:
        return False
    is_router = name == model.hugging_face_name(f"model.layers.{ROUTER}")
    return is_router or name in expert_parameters(model) or name.rpartition(".")[2] in TAKEN_FOR_EXPERTS


def _entries(name: str, layers: Sequence[int], model: ModelConfig) -> list[str]:
    if tuple(layers) == model.layers_with(_our_name(name, model)):
        return [_parameter(name.partition(".layers.")[2], name, model)]
    return [layer_name(_parameter(name, name, model), layer) for layer in layers]


def _parameter(spelling: str, name: str, model: ModelConfig) -> str:
    """Returns the parameter of a module: that of the experts itself, or the module's weight."""
    return spelling if name in expert_parameters(model) else f"{spelling}.weight"


def _our_name(name: str, model: ModelConfig) -> str:
    inner = (*model.linear_shapes(), *model.expert_targets(), ROUTER)
    return {model.hugging_face_name(f"model.layers.{each}"): each for each in inner}[name]


def expert_tensors(lora: AdapterArrays, layers_of: LayersOf, model: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of adapters on experts, for each layer: A [E R, K] and B [N, R E].

    Rows of A are those of the first expert, of the second, ...; columns of B those of the first rank of all experts, of
    the second, .... An adapter that the experts share is repeated for each of them. Rows of B have the order of the
    parameter's outputs: gate before up, or in turns.

    Args:
      lora: {"model.layers.mlp.experts.down_proj": {"lora_a": [S, E or 1, K, R], "lora_b": [S, E or 1, R, N]}}.
    """
    names = [name for name in expert_parameters(model) if name in lora]
    tensors = {}
    for name in names:
        assert model.experts is not None
        for row, layer in enumerate(layers_of[name]):
            both = all(layer in layers_of[each] for each in names) and len(names) > 1
            prefix = _prefix(name, layer, nested=both and name == names[0])
            for leaf, flatten in FLATTENED.items():
                values = np.asarray(lora[name][leaf][row])
                if leaf == "lora_b" and _takes_turns(name, model):
                    values = _alternating(values)
                whole = np.broadcast_to(values, (model.experts.count, *values.shape[1:]))
                tensors[f"{prefix}.{TENSORS[leaf]}"] = np.ascontiguousarray(flatten(whole))
    return tensors


def _takes_turns(name: str, model: ModelConfig) -> bool:
    """True if outputs of gate and up take turns in a parameter."""
    assert model.experts is not None
    return model.experts.interleaved and name.endswith("gate_up_proj")


def _alternating(b: np.ndarray) -> np.ndarray:
    """Returns B [..., N] with the outputs of gate and up alternating; here all of gate come first."""
    return b.reshape(*b.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(b.shape)


def _in_halves(b: np.ndarray) -> np.ndarray:
    """Inverts `_alternating`."""
    return b.reshape(*b.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(b.shape)


def _prefix(name: str, layer: int, *, nested: bool) -> str:
    module = layer_name(name, layer).rpartition(".")[0]
    return f"{PREFIX}{module}" + (f".{NESTED}" if nested else "")


def _flat_a(a_EKR: np.ndarray) -> np.ndarray:
    return a_EKR.swapaxes(1, 2).reshape(-1, a_EKR.shape[1])


def _flat_b(b_ERN: np.ndarray) -> np.ndarray:
    return b_ERN.transpose(2, 1, 0).reshape(b_ERN.shape[2], -1)


def _stacked_a(flat: np.ndarray, experts: int) -> np.ndarray:
    return flat.reshape(experts, -1, flat.shape[1]).swapaxes(1, 2)


def _stacked_b(flat: np.ndarray, experts: int) -> np.ndarray:
    return flat.reshape(flat.shape[0], -1, experts).transpose(2, 1, 0)


FLATTENED = {"lora_a": _flat_a, "lora_b": _flat_b}
STACKED = {"lora_a": _stacked_a, "lora_b": _stacked_b}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadParameters:
    """Adapters on experts and routers that were read from a file.

    Attributes:
      lora: by our names: experts as of `expert_tensors`, a router as {"lora_a": [S, K, R], "lora_b": [S, R, E]}.
      layers: the layers of each, by our names.
      rest: the tensors of other modules.
      problems: all that makes the tensors unusable.
    """

    lora: dict[str, dict[str, np.ndarray]]
    layers: dict[str, tuple[int, ...]]
    rest: list[TensorEntry]
    problems: list[str]


def read_parameters(targets: Sequence[str], entries: Sequence[TensorEntry], model: ModelConfig) -> ReadParameters:
    """Reads the adapters on experts and routers out of the tensors of an adapter.

    Args:
      targets: the adapter's target_parameters.
    """
    read = ReadParameters(lora={}, layers={}, rest=[], problems=[])
    left = {entry.name: entry for entry in entries}
    inner = () if model.experts is None else (*model.expert_targets(), ROUTER)
    chosen = {name: layers for name in inner if (layers := _targeted(targets, name, model))}
    for name, layers in chosen.items():
        prefixes = [_prefix_of(name, layer, chosen, model) for layer in layers]
        names = {leaf: [f"{prefix}.{end}" for prefix in prefixes] for leaf, end in TENSORS.items()}
        missing = [each for of_leaf in names.values() for each in of_leaf if each not in left]
        read.problems.extend(f"{each}: missing, but the adapter's target_parameters name it" for each in missing)
        if missing:
            continue
        found = {leaf: [left.pop(each) for each in of_leaf] for leaf, of_leaf in names.items()}
        experts, (n, k) = _shape(name, model)
        columns = found["lora_a"][0].rows
        expected = {"lora_a": (columns, k), "lora_b": (n, columns)}
        of_all = f", with one rank for each of {experts} experts" if experts > 1 else ""
        wrong = [
            f"{entry.name}: shape {list(entry.shape)}, expected {list(expected[leaf])}{of_all}"
            for leaf, entries in found.items()
            for entry in entries
            if entry.shape != expected[leaf] or columns % experts
        ]
        read.problems.extend(wrong)
        if not wrong:
            read.lora[f"model.layers.{name}"] = {leaf: _stack(name, leaf, each, model) for leaf, each in found.items()}
            read.layers[f"model.layers.{name}"] = layers
    read.rest.extend(left.values())
    return read


def _shape(inner: str, model: ModelConfig) -> tuple[int, tuple[int, int]]:
    """Returns (number of experts with an adapter each, (N, K) of one)."""
    assert model.experts is not None
    if inner == ROUTER:
        return 1, (model.experts.count, model.embed_dim)
    return model.experts.count, model.expert_targets()[inner]


def _stack(inner: str, leaf: str, entries: Sequence[TensorEntry], model: ModelConfig) -> np.ndarray:
    experts, _ = _shape(inner, model)
    stack = np.stack([STACKED[leaf](np.asarray(entry.read(), np.float32), experts) for entry in entries])
    if leaf == "lora_b" and _takes_turns(inner, model):
        stack = _in_halves(stack)
    return stack[:, 0] if inner == ROUTER else stack


def _targeted(targets: Sequence[str], inner: str, model: ModelConfig) -> tuple[int, ...]:
    """Returns the layers whose parameter an entry names: the whole name, or the end of it."""
    name = model.hugging_face_name(f"model.layers.{inner}")
    entry = _parameter(name, name, model)
    names = {layer: f".{layer_name(entry, layer)}" for layer in model.layers_with(inner)}
    return tuple(layer for layer, name in names.items() if any(name.endswith(f".{target}") for target in targets))


def _prefix_of(inner: str, layer: int, chosen: Mapping[str, Sequence[int]], model: ModelConfig) -> str:
    """Returns the name of an adapter in a file, without its end."""
    name = model.hugging_face_name(f"model.layers.{inner}")
    if inner == ROUTER:
        return f"{PREFIX}{layer_name(name, layer)}"
    first, last = model.expert_targets()
    return _prefix(name, layer, nested=inner == first and layer in chosen.get(last, ()))
