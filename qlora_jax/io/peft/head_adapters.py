"""Sequence heads in PEFT's format: SEQ_CLS adapters with the head's matrix, and FEATURE_EXTRACTION adapters.

transformers' classes for sequence classification have the head as `score`, which PEFT stores by `modules_to_save`. A
feature extractor is the model without any head, so the names of its modules lack the base's prefix.

Dimension key: D embed, C outputs.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.io.head_file import read_head
from qlora_jax.methods.peft_form import PREFIX, PeftKeys
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import SCORE
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import JsonObject

SEQ_CLS, FEATURES = "SEQ_CLS", "FEATURE_EXTRACTION"  # task types of PEFT
MATRIX = f"{PREFIX}{SCORE}.weight"
# Names of the matrix; the first that exists is used.
MATRICES = (MATRIX, f"{PREFIX}{SCORE}.modules_to_save.weight")
FRESH = f"{PREFIX}{SCORE}.original_module.weight"  # the initial matrix, which some versions save too
PATTERNS = ("rank_pattern", "alpha_pattern")
MODULES = (SCORE, "classifier")  # PEFT lists both for SEQ_CLS, whichever the model has


def split_head(lora: AdapterArrays) -> tuple[AdapterArrays, AdapterArrays]:
    """Splits LoRA parameters into (all but the sequence head, the sequence head)."""
    head = {name: leaves for name, leaves in lora.items() if name == SCORE}
    return {name: leaves for name, leaves in lora.items() if name != SCORE}, head


def with_head(
    config: JsonObject, tensors: Mapping[str, np.ndarray], score: AdapterArrays, head: TrainedHead, model: ModelConfig
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns adapter_config.json and the tensors of a causal model's adapter as those of its sequence head.

    Args:
      score: the head's LoRA parameters, {"score": {"weight": [D, C]}}; empty for embeddings.
    """
    if not score:
        start = base_prefix(model)
        names = [name.removeprefix(start) for name in config["target_modules"]]
        bare = {_without_prefix(name, start): tensor for name, tensor in tensors.items()}
        patterns = {
            name: {_bare_pattern(pattern, start): value for pattern, value in config[name].items()}
            for name in PATTERNS
            if name in config
        }
        return {**config, **patterns, "task_type": FEATURES, "target_modules": names}, bare
    saved = [SCORE, *(config.get("modules_to_save") or [])]
    weight_CD = np.ascontiguousarray(np.asarray(score[SCORE]["weight"]).T)
    return {**config, "task_type": SEQ_CLS, "modules_to_save": saved}, {**tensors, MATRIX: weight_CD}


def base_prefix(model: ModelConfig) -> str:
    """Returns the prefix of the modules of transformers' base model, such as "model."."""
    return model.hugging_face_name("model.layers").removesuffix("layers")


def _bare_pattern(pattern: str, start: str) -> str:
    """Returns a pattern of modules without the prefix, however its dots are written; PEFT matches whole names."""
    anchor, body = ("^", pattern[1:]) if pattern.startswith("^") else ("", pattern)
    return anchor + body.removeprefix(start).removeprefix(re.escape(start))


def _without_prefix(name: str, start: str) -> str:
    return PREFIX + name.removeprefix(PREFIX + start) if name.startswith(PREFIX + start) else name


def head_modules(config: PeftKeys) -> tuple[str, ...]:
    """Returns the names of a sequence head that `modules_to_save` may have."""
    return MODULES if config.get("task_type") == SEQ_CLS else ()


def without_lm_head(config: PeftKeys, model: ModelConfig) -> ModelConfig:
    """Returns the features by which an adapter's tables are read; one with a sequence head has only the embedding."""
    has_head = config.get("task_type") in (SEQ_CLS, FEATURES)
    return dataclasses.replace(model, tie_embeddings=True) if has_head else model


def named_as_causal(config: PeftKeys, entries: Sequence[TensorEntry], model: ModelConfig) -> list[TensorEntry]:
    """Returns the tensors of an adapter under the names that a causal model's adapter has."""
    if config.get("task_type") != FEATURES:
        return [*entries]
    start = base_prefix(model)
    return [
        dataclasses.replace(entry, name=f"{PREFIX}{start}{entry.name.removeprefix(PREFIX)}")
        if entry.name.startswith(PREFIX) and not entry.name.startswith(PREFIX + start)
        else entry
        for entry in entries
    ]


def read_score(
    folder: Path, config: PeftKeys, entries: Sequence[TensorEntry], model: ModelConfig
) -> tuple[TrainedHead | None, dict[str, dict[str, np.ndarray]], list[TensorEntry], list[str]]:
    """Reads the sequence head of an adapter: (the head, its LoRA parameters, all other tensors, problems).

    An adapter of another library has no head.json: with one output it is a regression, or a reward model where one is
    needed; with more it is a classification whose labels are "0", "1" and so on.
    """
    rest = [entry for entry in entries if entry.name not in (*MATRICES, FRESH)]
    task = config.get("task_type")
    if task == FEATURES:
        return read_head(folder) or TrainedHead(objective="embedding", described=False), {}, rest, []
    if task != SEQ_CLS:
        return None, {}, [*entries], []
    named = {entry.name: entry for entry in entries}
    entry = next((named[name] for name in MATRICES if name in named), None)
    if entry is None:
        return None, {}, rest, [f"{MATRIX} is missing: an adapter for {SEQ_CLS} has its head"]
    if len(entry.shape) != 2 or entry.shape[1] != model.embed_dim:
        return None, {}, rest, [f"{entry.name}: shape {list(entry.shape)}, expected [outputs, {model.embed_dim}]"]
    head = read_head(folder) or _unnamed(entry.shape[0])
    if head.outputs != entry.shape[0]:
        return None, {}, rest, [f"{entry.name}: {entry.shape[0]} outputs, but head.json describes {head.outputs}"]
    weight_DC = np.ascontiguousarray(np.asarray(entry.read(), np.float32).T)
    return head, {SCORE: {"weight": weight_DC}}, rest, []


def _unnamed(outputs: int) -> TrainedHead:
    if outputs == 1:
        return TrainedHead(objective="regression", described=False)
    return TrainedHead(objective="classification", labels=tuple(map(str, range(outputs))), described=False)
