"""A PEFT adapter folder as LoRA parameters and the settings that belong to them.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.entries import TensorEntry
from qlora_jax.io.hf_tokenizer import read_json
from qlora_jax.io.hub import named
from qlora_jax.io.inventory import LAYER, layer_name
from qlora_jax.io.peft import PREFIX, Lora, target_suffixes
from qlora_jax.io.safetensors import read_header
from qlora_jax.models.config import ModelConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
# Settings that change nothing that is computed; targets are what there are tensors of.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "peft_version", "revision"),
    *("loftq_config", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "target_modules"),
    *("task_type", "eva_config", "corda_config"),
}
# Initial values that leave the base as it is; others (PiSSA, OLoRA, LoftQ, CorDA) put a part of it into the adapter.
INITS = (True, False, "gaussian", "orthogonal", "eva")
ONLY = {"peft_type": "LORA", "bias": "none"}
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """What a folder holds.

    Attributes:
      args: settings with which `add_lora` makes adapters of these shapes and scalings.
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}} in f32, by our names.
      base: where the base model was found when the adapter was made; None where the config does not say.
    """

    args: LoraArgs
    lora: dict[str, dict[str, np.ndarray]]
    base: str | None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str | None:
    """Where its base model is, as the adapter says; a name on the Hub with the revision, if one is told."""
    config = read_json(folder / CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    on_hub = named(base) if base and revision else None
    return str(dataclasses.replace(on_hub, revision=revision)) if on_hub else base


def read_adapter(folder: Path, model: ModelConfig) -> PeftAdapter:
    """The LoRA adapter in a folder, for the model with these features.

    Raises:
      ValueError: another kind of adapter, settings that are not supported, or tensors that do not belong to all layers
        of linear layers of the model: all problems of the settings, or of the tensors, at once.
    """
    config = read_json(folder / CONFIG)
    _check_settings(folder, config)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(_no_weights(folder))
    lora = _stacked(folder, list(read_header(folder / WEIGHTS)), model)
    linears = [model.hugging_face_name(f"model.layers.{name}") for name in model.linear_shapes()]
    args = LoraArgs(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        target_modules=target_suffixes([model.hugging_face_name(name) for name in lora], linears),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern={name: float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()},
        use_rslora=bool(config.get("use_rslora", False)),
    )
    return PeftAdapter(args=args, lora=lora, base=config.get("base_model_name_or_path"))


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE).is_file():
        return (
            f"{folder} holds {PICKLE}, a pickle: reading such a file can run any code, so it is refused. Convert it, "
            "if you trust it, with peft: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
        )
    return f"{folder} has {CONFIG}, but no {WEIGHTS}"


def _check_settings(folder: Path, config: Mapping[str, Any]) -> None:
    problems = [
        f"{name} = {config.get(name)!r}: only {only!r} is supported"
        for name, only in ONLY.items()
        if config.get(name, only) != only
    ]
    problems += [f"{name} is missing" for name in ("r", "lora_alpha") if name not in config]
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        problems.append(
            f"init_lora_weights = {init!r} changes the base that the adapter belongs to: convert it to a plain LoRA "
            "with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*ONLY, *READ, *HARMLESS, "init_lora_weights"}
    problems += [
        f"{name} = {value!r} is not supported"
        for name, value in sorted(config.items())
        if name not in known and value not in (None, False, {}, [])
    ]
    if problems:
        raise ValueError(f"{folder / CONFIG}:\n  " + "\n  ".join(problems))


def _stacked(folder: Path, entries: list[TensorEntry], model: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """Layers of each projection as one array, from all of them."""
    by_key = {(match["module"], match["matrix"]): e for e in entries if (match := KEY.fullmatch(e.name))}
    problems = [f"{entry.name}: not a matrix of LoRA" for entry in entries if not KEY.fullmatch(entry.name)]
    lora: dict[str, dict[str, np.ndarray]] = {}
    for inner, (shape, _) in model.linear_shapes().items():
        name = f"model.layers.{inner}"
        modules = [model.hugging_face_name(layer_name(name, layer)) for layer in range(model.num_layers)]
        found = {matrix: [by_key.pop((module, matrix), None) for module in modules] for matrix in "AB"}
        if any(entry is not None for entry in (*found["A"], *found["B"])):
            problems += (wrong := _problems(modules, found, shape))
            lora[name] = {} if wrong else {ours: _stack(found[matrix]) for ours, matrix in MATRICES.items()}
    problems += [
        f"{module}: no linear layer of the model" for module in sorted({LAYER.sub(".layers.*.", m) for m, _ in by_key})
    ]
    if problems or not lora:
        lines = problems or ["no matrix of LoRA in it"]
        raise ValueError(f"{folder / WEIGHTS} does not fit the model:\n  " + "\n  ".join(lines))
    return lora


MATRICES = {"lora_a": "A", "lora_b": "B"}


def _problems(modules: list[str], found: dict[str, list[TensorEntry | None]], shape: tuple[int, int]) -> list[str]:
    absent = [
        f"{module}.lora_{matrix}.weight is missing: all layers of a projection are adapted alike here"
        for matrix, entries in found.items()
        for module, entry in zip(modules, entries, strict=True)
        if entry is None
    ]
    if absent:
        return absent
    ranks = {entry.shape[0] for entry in found["A"] if entry is not None}
    if len(ranks) > 1:
        return [f"{LAYER.sub('.layers.*.', modules[0])}: ranks {sorted(ranks)} in its layers; one for all is supported"]
    (rank,), (n, k) = ranks, shape
    expected = {"A": (rank, k), "B": (n, rank)}
    return [
        f"{entry.name}: shape {list(entry.shape)}, expected {list(expected[matrix])}"
        for matrix, entries in found.items()
        for entry in entries
        if entry is not None and entry.shape != expected[matrix]
    ]


def _stack(entries: list[TensorEntry | None]) -> np.ndarray:
    """f32, each layer transposed: PEFT's matrices are [out, in]."""
    return np.stack([np.asarray(entry.read(), np.float32).T for entry in entries if entry is not None])


SCALING = ("rank", "alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def read_start(folder: Path, model: ModelConfig, args: LoraArgs) -> Lora:
    """The parameters of the adapter in a folder, for training with these settings to go on from.

    Raises:
      ValueError: settings that are not the adapter's, each with the adapter's own.
    """
    adapter = read_adapter(folder, model)
    wrong = [
        f"lora.{name}: {getattr(args, name)!r}, in the adapter {getattr(adapter.args, name)!r}"
        for name in SCALING
        if getattr(args, name) != getattr(adapter.args, name)
    ]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(f"lora.start={folder}: give the adapter's own settings, for it was scaled by them:\n  {lines}")
    return adapter.lora


def check_shapes(path: Path, lora: Lora, expected: Lora) -> None:
    """Passes an adapter that has the projections and shapes expected.

    Raises:
      ValueError: names every projection where it has not.
    """
    found, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (lora, expected))
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if names:
        lines = "\n".join(f"  {name}: {found.get(name)}, expected {wanted.get(name)}" for name in names)
        raise ValueError(f"the adapter of {path} does not fit the model:\n{lines}")
