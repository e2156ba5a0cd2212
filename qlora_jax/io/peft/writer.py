"""Writes adapters in PEFT's format: adapter_model.safetensors, adapter_config.json and a README."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from qlora_jax.atomic_files import write_bytes, write_text
from qlora_jax.config import LoraArgs
from qlora_jax.io.head_file import Padding, write_head
from qlora_jax.io.peft.multimodal import text_half_only
from qlora_jax.io.peft.readme import readme
from qlora_jax.methods.method import method_of
from qlora_jax.methods.peft_form import CONFIG, NO_ARRAYS, WEIGHTS, TrainedAdapter
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import JsonObject


def in_peft_format(
    lora: AdapterArrays, args: LoraArgs, model: ModelConfig, base: str, frozen: Mapping[str, np.ndarray] = NO_ARRAYS
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns (adapter_config.json, tensors) of a method that PEFT has.

    Args:
      lora: trained arrays by Hugging Face's names without the layer's index.
      base: where PEFT finds the base model: a path or a name.
      frozen: arrays that the method added to the base; empty: those of its settings.

    Raises:
      ValueError: PEFT cannot compute the adapter.
    """
    method = method_of(args.method)
    assert method.peft is not None, "the method's declaration refuses the export"
    frozen = frozen or method.frozen_arrays(model, args)
    adapter = TrainedAdapter(lora=lora, args=args, model=model, frozen=frozen)
    return text_half_only(method.peft.config(adapter, base), method.peft, model), method.peft.tensors(adapter)


def write_adapter(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: JsonObject,
    rows: int | None = None,
    head: TrainedHead | None = None,
    padding: Padding | None = None,
) -> None:
    """Writes the adapter's files into an existing folder.

    Args:
      rows: the length to which the base's embedding must be resized before PEFT loads the adapter, if any.
      head: the sequence head, if the adapter has one; it is described in head.json.
      padding: the padding token of its texts, for README.md.
    """
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / "README.md", readme(config, _loadable(config), rows, head, padding))
    if head is not None:
        write_head(folder, head)


def _loadable(config: JsonObject) -> str:
    base, revision = config["base_model_name_or_path"], config.get("revision")
    loadable = repr("the same model as a Hugging Face folder" if is_gguf(base) else base)
    return f"{loadable}, revision={revision!r}" if revision else loadable


def is_gguf(base: str) -> bool:
    """True if a base is a GGUF file, which transformers and peft cannot load directly."""
    return base.endswith(".gguf")
