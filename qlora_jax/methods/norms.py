"""LayerNorm tuning (Zhao et al., 2024): the weights and biases of norms train.

Dimension key: L layers, D width of the norm.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape
from qlora_jax.methods.method import FINAL_NORM, Given, Method, norm_widths, norms
from qlora_jax.methods.peft_form import (
    PREFIX,
    PeftFile,
    PeftForm,
    PeftLeaf,
    ReadAdapter,
    TrainedAdapter,
    check_fits,
)
from qlora_jax.methods.peft_names import target_suffixes
from qlora_jax.methods.targets import AUTO, target_layers_of
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import NORM_PLACEMENTS, ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.untrusted_json import JsonObject


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


class NormForm(PeftForm):
    """PEFT's LN_TUNING: trained norms, weight [D] and bias [D] of a LayerNorm, which replace those of the base."""

    leaves: ClassVar[Mapping[str, PeftLeaf]] = {
        "gain": PeftLeaf("ln_tuning_layers.weight"),
        "bias": PeftLeaf("ln_tuning_layers.bias"),
    }

    def describe(self, config: JsonObject) -> str:
        """Returns what an adapter is."""
        return "Norms from LayerNorm tuning"

    def config(self, adapter: TrainedAdapter, base: str) -> JsonObject:
        """Returns adapter_config.json, without the settings that only adapters of projections have."""
        return {
            "peft_type": "LN_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "target_modules": target_suffixes(list(adapter.lora), list(norm_widths(adapter.model))),
            "exclude_modules": None,
            "modules_to_save": None,
        }

    def tensors(self, adapter: TrainedAdapter) -> dict[str, np.ndarray]:
        """Returns the vectors of each norm of each layer; those of the final norm are not stacked."""
        return {
            name: np.ascontiguousarray(vector)
            for module, leaves in adapter.lora.items()
            for leaf, values in leaves.items()
            for name, vector in zip(
                self._names(module, leaf, adapter.model),
                np.asarray(values).reshape(-1, values.shape[-1]),
                strict=True,
            )
        }

    def read(self, file: PeftFile) -> ReadAdapter:
        """Reads the vectors of each norm."""
        left, model = {entry.name: entry for entry in file.tensors}, file.model
        leaves = list(self.leaves) if model.norm == "layer" else ["gain"]
        lora: dict[str, dict[str, np.ndarray]] = {}
        problems = [*file.problems]
        for module, width in norm_widths(model).items():
            named = {leaf: self._names(module, leaf, model) for leaf in leaves}
            found = {name: left.pop(name) for names in named.values() for name in names if name in left}
            if found:
                wrong = _problems([name for names in named.values() for name in names], found, width)
                problems += wrong
                lora[module] = {} if wrong else {leaf: _stack(module, names, found) for leaf, names in named.items()}
        problems += [f"{name}: not a norm of the model, or unexpected in an adapter of this method" for name in left]
        check_fits(file.folder, problems or ([] if lora else ["it has no tensor of an adapter"]))
        args = LoraArgs(method="ln_tuning", target_modules=target_suffixes(list(lora), list(norm_widths(model))))
        names = (*(f"model.layers.{name}" for name in model.norm_widths()), FINAL_NORM)
        ours = {model.hugging_face_name(name): name for name in names}
        return ReadAdapter({ours[name]: leaves for name, leaves in lora.items()}, args)

    def _names(self, module: str, leaf: str, model: ModelConfig) -> list[str]:
        """Returns PEFT's names of a norm's array, of each layer; of the final norm, one."""
        layers = model.num_layers if ".layers." in module else 1
        return [f"{PREFIX}{layer_name(module, layer)}.{self.leaves[leaf].name}" for layer in range(layers)]


def _problems(names: Sequence[str], found: dict[str, TensorEntry], width: int) -> list[str]:
    missing = [f"{name} is missing: all layers of a norm must train" for name in names if name not in found]
    return missing or [
        f"{name}: shape {list(entry.shape)}, expected {[width]}"
        for name, entry in found.items()
        if entry.shape != (width,)
    ]


def _stack(module: str, names: Sequence[str], found: dict[str, TensorEntry]) -> np.ndarray:
    vectors = [np.asarray(found[name].read(), np.float32) for name in names]
    return np.stack(vectors) if ".layers." in module else vectors[0]


class NormTuning(Method):
    """The method `ln_tuning`."""

    peft = NormForm()

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns the norms that train."""
        return norm_targets(config, spec)

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns nothing: gradients of norms read what the frozen model keeps."""
        return AdapterShape()

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Makes the targeted norms trainable."""
        chosen = norm_targets(model.config, spec)
        for name, norm in norms(model):
            if name in chosen:
                norm.make_trainable()


METHOD = NormTuning()
