"""The protocol of a method's form in PEFT's files, and the parts that all forms share.

Dimension key: L layers, K in, N out.
"""

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NamedTuple, TypedDict

import numpy as np
from pydantic import Field, with_config

from qlora_jax.config import LoraArgs
from qlora_jax.methods.peft_names import EVERY_LAYER, SomeLayers, linears_of, target_settings
from qlora_jax.methods.targets import Layers, adapter_layers, some_layers
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.models.tensor_names import EXPERT, LAYER, MAX_LINES, layer_name
from qlora_jax.untrusted_json import JsonObject

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NO_ARRAYS: Mapping[str, np.ndarray] = MappingProxyType({})
NOT_LINEAR = "not a linear layer of the model, or unexpected in an adapter of this method"
PER_EXPERT = "an adapter per expert, as of transformers 4. Load it with PEFT under transformers 5 and save it again"

OwnKeys = Any  # the settings of one form, a TypedDict that extends PeftKeys
type TokenId = Annotated[int, Field(ge=0, lt=2**31)]


@with_config(extra="allow")
class PeftKeys(TypedDict, total=False):
    """The settings in adapter_config.json of every method; other keys are kept, because unsupported ones are errors."""

    peft_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    bias: str
    target_modules: object
    exclude_modules: object
    peft_version: str | None
    modules_to_save: list[str] | None
    trainable_token_indices: list[TokenId] | dict[str, list[TokenId]] | None
    ensure_weight_tying: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """An adapter to be written.

    Attributes:
      lora: trained arrays by Hugging Face's names without the layer's index, such as
        {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}.
      args: the settings of training.
      frozen: arrays that the method added to the base.
    """

    lora: AdapterArrays
    args: LoraArgs
    model: ModelConfig
    frozen: Mapping[str, np.ndarray]

    @property
    def layers_of(self) -> dict[str, Layers]:
        """The layers with an adapter of each module."""
        return adapter_layers(self.model, self.args)

    @property
    def some_layers(self) -> dict[str, Layers]:
        """The layers of the modules that have an adapter only in some layers."""
        return some_layers(self.layers_of, self.model.num_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftFile[Keys]:
    """An adapter to be read; `problems` are those found so far, which are reported together with those of the form.

    Attributes:
      tensors: those of the method: without embedding and heads.
    """

    folder: Path
    config: Keys
    tensors: list[TensorEntry]
    model: ModelConfig
    problems: list[str]


class ReadAdapter(NamedTuple):
    """An adapter that a form has read.

    Fields:
      lora: trained arrays in f32 by our names, in the form of `ModelParts.lora`.
      args: the settings with which `attach_method` adds adapters of these shapes and scalings.
      frozen: arrays that the method would draw from `args`, if the file has others.
    """

    lora: dict[str, dict[str, np.ndarray]]
    args: LoraArgs
    frozen: Mapping[str, np.ndarray] = NO_ARRAYS


class PeftLeaf(NamedTuple):
    """A trained array in PEFT's files: its name, and the change of one layer's values, which is its own inverse."""

    name: str
    change: Callable[[np.ndarray], np.ndarray] = np.asarray


class PeftForm(abc.ABC):
    """The form of a method in PEFT's files: one instance for each `peft_type`, without state.

    Attributes:
      keys: its settings in adapter_config.json; a TypedDict that extends PeftKeys.
      required: settings without which it cannot be read.
      unused: settings that change nothing.
      leaves: our name of a trained array -> PEFT's.
      reads_exclude_modules: PEFT applies the setting `exclude_modules`.
    """

    keys: ClassVar[type] = PeftKeys
    required: ClassVar[tuple[str, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()
    leaves: ClassVar[Mapping[str, PeftLeaf]]
    reads_exclude_modules: ClassVar[bool] = True

    @abc.abstractmethod
    def describe(self, config: JsonObject) -> str:
        """Returns what an adapter is, for README.md, such as "A LoRA adapter (rank 16, alpha 32)"."""

    @abc.abstractmethod
    def config(self, adapter: TrainedAdapter, base: str) -> JsonObject:
        """Returns the adapter_config.json from which PEFT builds the trained adapter; see `common_config`.

        Args:
          base: where PEFT finds the base model: a path or a name.
        """

    def tensors(self, adapter: TrainedAdapter) -> dict[str, np.ndarray]:
        """Returns the tensors of adapter_model.safetensors."""
        return layer_tensors(adapter.lora, self.leaves)

    def settings(self, config: OwnKeys, model: ModelConfig) -> set[str]:
        """Returns the settings that it can read from this file."""
        return {*self.keys.__annotations__}

    def problems(self, config: OwnKeys) -> list[str]:
        """Lists values of settings that are not supported."""
        return []

    @abc.abstractmethod
    def read(self, file: PeftFile[OwnKeys]) -> ReadAdapter:
        """Reads the tensors and settings of an adapter.

        Raises:
          ValueError: they do not fit the model; all problems are named, those of `file` first.
        """

    def shapes(self, first: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of a layer's tensors, by our names, given those of the first layer.

        Args:
          shape: (N, K) of the projection.
        """
        return first

    def differences(self, ours: LoraArgs, of_adapter: LoraArgs, model: ModelConfig) -> list[str]:
        """Lists settings of a run that must equal those of the adapter that it starts from, and do not."""
        return []


def common_config(adapter: TrainedAdapter, base: str, modules: Iterable[str] | None = None) -> JsonObject:
    """Returns the settings that adapters of projections share.

    Args:
      modules: the targets, by Hugging Face's names without the layer's index; None: all of the adapter's.
    """
    names = [*(adapter.lora if modules is None else modules)]
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        **target_settings(names, linears_of(adapter.model), adapter.some_layers),
    }


def layer_tensors(
    lora: AdapterArrays, leaves: Mapping[str, PeftLeaf], of_some: SomeLayers = EVERY_LAYER
) -> dict[str, np.ndarray]:
    """Returns the tensors of each layer of each module.

    Args:
      lora: as in `TrainedAdapter`; stacks over the layers with an adapter.
      of_some: the layers of modules that have an adapter only in some.
    """
    return {
        f"{PREFIX}{layer_name(name, layer)}.{leaves[leaf].name}": np.ascontiguousarray(leaves[leaf].change(values))
        for name, stacks in lora.items()
        for leaf, stack in stacks.items()
        for layer, values in zip(of_some.get(name, range(len(stack))), np.asarray(stack), strict=True)
    }


def setting_differences(names: Sequence[str], ours: LoraArgs, of_adapter: LoraArgs) -> list[str]:
    """Lists settings with different values."""
    return [
        f"lora.{name}: found {getattr(ours, name)!r}, expected {getattr(of_adapter, name)!r}"
        for name in names
        if getattr(ours, name) != getattr(of_adapter, name)
    ]


def stack_layers(
    file: PeftFile[OwnKeys],
    form: PeftForm,
    wanted: Sequence[str] | None = None,
    of_some: SomeLayers = EVERY_LAYER,
    *,
    given: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Stacks the layers of each projection into f32 arrays in our orientation.

    Args:
      wanted: the leaves that the adapter has; None: all of the form.
      of_some: by our names, the layers with an adapter, for projections that have one only in some layers.
      given: True if the adapter has parameters beside projections, so that it may have no projections.

    Raises:
      ValueError: tensors do not fit the model; all problems are named.
    """
    theirs = {leaf.name: ours for ours, leaf in form.leaves.items()}
    key = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<leaf>{'|'.join(map(re.escape, theirs))})")
    matches = {entry.name: key.fullmatch(entry.name) for entry in file.tensors}
    by_key = {(match["module"], theirs[match["leaf"]]): e for e in file.tensors if (match := matches[e.name])}
    problems = file.problems + [
        f"{name}: unexpected in an adapter of this method" for name, match in matches.items() if not match
    ]
    lora: dict[str, dict[str, np.ndarray]] = {}
    for inner, (shape, _) in file.model.linear_shapes().items():
        name = f"model.layers.{inner}"
        numbers = file.model.layers_with(inner)
        modules = [file.model.hugging_face_name(layer_name(name, layer)) for layer in numbers]
        found = {leaf: [by_key.pop((module, leaf), None) for module in modules] for leaf in wanted or form.leaves}
        if any(entry is not None for entries in found.values() for entry in entries):
            rows = [numbers.index(layer) for layer in of_some.get(name, numbers)]
            problems += [
                f"{module}: unexpected, because the adapter's settings do not target this layer"
                for row, module in enumerate(modules)
                if row not in rows and any(entries[row] is not None for entries in found.values())
            ]
            modules = [modules[row] for row in rows]
            found = {leaf: [entries[row] for row in rows] for leaf, entries in found.items()}
            problems += (wrong := _layer_problems(modules, found, form, shape))
            lora[name] = {} if wrong else {leaf: _stack(form.leaves[leaf], each) for leaf, each in found.items()}
    problems += _unknown(by_key, form)
    check_fits(file.folder, problems or ([] if lora or given else ["it has no tensor of an adapter"]))
    return lora


def check_fits(folder: Path, problems: Sequence[str]) -> None:
    """Raises ValueError with all problems of an adapter's tensors, if there are any; many lines are counted."""
    if problems:
        more = [f"and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        lines = "\n  ".join([*problems[:MAX_LINES], *more])
        raise ValueError(f"{folder / WEIGHTS} does not fit the model:\n  {lines}")


def _unknown(left: Iterable[tuple[str, str]], form: PeftForm) -> list[str]:
    """Describes tensors (module, leaf) that fit no projection, one line for the same one in all layers and experts."""
    places = {(EXPERT.sub(".experts.*.", LAYER.sub(".layers.*.", module)), leaf) for module, leaf in left}
    return [
        f"{module}.{form.leaves[leaf].name}: {PER_EXPERT if '.experts.*.' in module else NOT_LINEAR}"
        for module, leaf in sorted(places)
    ]


Found = Mapping[str, Sequence[TensorEntry | None]]  # the entry of each layer, by our name of the leaf


def _layer_problems(modules: list[str], found: Found, form: PeftForm, shape: tuple[int, int]) -> list[str]:
    if not modules:
        return ["target_modules, exclude_modules, layers_to_transform: together they target no layer of the model"]
    missing = [
        f"{module}.{form.leaves[leaf].name}: missing, but the adapter's settings target this layer"
        for leaf, entries in found.items()
        for module, entry in zip(modules, entries, strict=True)
        if entry is None
    ]
    if missing:
        return missing
    first = {leaf: entries[0].shape for leaf, entries in found.items() if entries[0] is not None}
    ranks = {entry.shape[0] for entry in found.get("lora_a", ()) if entry is not None}
    if len(ranks) > 1:
        name = LAYER.sub(".layers.*.", modules[0])
        return [f"{name}: its layers have different ranks (found {sorted(ranks)}), which is not supported"]
    expected = form.shapes(first, shape)
    return [
        f"{entry.name}: shape {list(entry.shape)}, expected {list(expected[leaf])}"
        for leaf, entries in found.items()
        for entry in entries
        if entry is not None and entry.shape != expected[leaf]
    ]


def _stack(leaf: PeftLeaf, entries: Sequence[TensorEntry | None]) -> np.ndarray:
    return np.stack([leaf.change(np.asarray(entry.read(), np.float32)) for entry in entries if entry is not None])
