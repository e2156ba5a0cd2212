"""A PEFT adapter folder as LoRA parameters and the settings that belong to them.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.hf.hub import hub_name_of
from qlora_jax.io.hf.reader import read_header
from qlora_jax.io.hf.tokenizer import read_json
from qlora_jax.io.model_source import TensorEntry
from qlora_jax.io.peft.embeddings import SETTINGS, read_tables, setting_problems
from qlora_jax.io.peft.writer import LEAVES, PREFIX, VECTOR, Lora, target_suffixes
from qlora_jax.io.tensor_map import LAYER, layer_name
from qlora_jax.models.add_adapters import ia3_targets
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.trainable_embeddings import trainable_table_names

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Settings that change nothing that is computed; targets are what there are tensors of.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "peft_version", "revision"),
    *("fan_in_fan_out", "loftq_config", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("target_modules", "task_type", "eva_config", "corda_config", "init_ia3_weights", "feedforward_modules"),
}
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# Initial values that leave the base as it is; others (PiSSA, OLoRA, LoftQ, CorDA) put a part of it into the adapter.
INITS = (True, False, "gaussian", "orthogonal", "eva")
ONLY = {"peft_type": ("LORA", "IA3"), "bias": ("none",)}
MATRICES = ("lora_a", "lora_b")
OF_METHOD = {"lora": MATRICES, "dora": (*MATRICES, "magnitude"), "ia3": ("vector",)}
LEAF_NAMES = {ours: theirs for ours, (theirs, _) in LEAVES.items()} | {"vector": VECTOR}
OURS = {theirs: ours for ours, theirs in LEAF_NAMES.items()}
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<leaf>{'|'.join(map(re.escape, OURS))})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """What a folder holds.

    Attributes:
      args: settings with which `add_lora` makes adapters of these shapes and scalings.
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}} in f32, by our names; with
        "magnitude" [L, N] for DoRA; {"vector": [L, N or K]} for (IA)^3; {"rows": [N, D]} of embedding and head.
      new_ids: of the tokens that these rows are of.
      tables: embedding and head in place of the base's, where they were trained whole.
      base: where the base model was found when the adapter was made; None where the config does not say.
    """

    args: LoraArgs
    lora: dict[str, dict[str, np.ndarray]]
    base: str | None
    new_ids: tuple[int, ...]
    tables: dict[str, np.ndarray]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str | None:
    """Where its base model is, as the adapter says; a name on the Hub with the revision, if one is told."""
    config = read_json(folder / CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    on_hub = hub_name_of(base) if base and revision else None
    return str(dataclasses.replace(on_hub, revision=revision)) if on_hub else base


def read_adapter(folder: Path, model: ModelConfig) -> PeftAdapter:
    """The adapter in a folder, for the model with these features.

    Raises:
      ValueError: another kind of adapter, settings that are not supported, or tensors that do not belong to all layers
        of linear layers of the model: all problems of the settings, or of the tensors, at once.
    """
    config = read_json(folder / CONFIG)
    _check_settings(folder, config, model)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(_no_weights(folder))
    tables, tensors, wrong = read_tables(config, list(read_header(folder / WEIGHTS)), model)
    if _kind(config) == "IA3":
        stacks = _stacked(folder, tensors, model, OF_METHOD["ia3"], wrong)
        args = _ia3_args(stacks, model)
        lora = {name: {"vector": leaves["vector"].reshape(model.num_layers, -1)} for name, leaves in stacks.items()}
    else:
        lora = _stacked(folder, tensors, model, OF_METHOD["dora" if config.get("use_dora") else "lora"], wrong)
        args = _low_rank_args(config, lora, model)
    base = config.get("base_model_name_or_path")
    return PeftAdapter(args=args, lora=lora | tables.rows, base=base, new_ids=tables.ids, tables=tables.whole)


def _kind(config: Mapping[str, Any]) -> str:
    return config.get("peft_type", "LORA")


def _suffixes(names: Iterable[str], model: ModelConfig) -> list[str]:
    linears = [model.hugging_face_name(f"model.layers.{name}") for name in model.linear_shapes()]
    return target_suffixes([model.hugging_face_name(name) for name in names], linears)


def _low_rank_args(config: Mapping[str, Any], lora: Lora, model: ModelConfig) -> LoraArgs:
    return LoraArgs(
        method="dora" if config.get("use_dora") else "lora",
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        target_modules=_suffixes(lora, model),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern={name: float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()},
        use_rslora=bool(config.get("use_rslora", False)),
    )


def _ia3_args(lora: Lora, model: ModelConfig) -> LoraArgs:
    """Whose inputs are scaled, the stacks say: [L, 1, K] there, and [L, N, 1] elsewhere."""
    on_inputs = [name for name, leaves in lora.items() if leaves["vector"].shape[1] == 1]
    return LoraArgs(
        method="ia3", target_modules=_suffixes(lora, model), feedforward_modules=_suffixes(on_inputs, model)
    )


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE).is_file():
        return (
            f"{folder} holds {PICKLE}, a pickle: reading such a file can run any code, so it is refused. Convert it, "
            "if you trust it, with peft: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
        )
    return f"{folder} has {CONFIG}, but no {WEIGHTS}"


def _check_settings(folder: Path, config: Mapping[str, Any], model: ModelConfig) -> None:
    problems = [
        f"{name} = {config[name]!r}: only {' or '.join(map(repr, possible))} is supported"
        for name, possible in ONLY.items()
        if name in config and config[name] not in possible
    ]
    if _kind(config) == "LORA":
        problems += [f"{name} is missing" for name in ("r", "lora_alpha") if name not in config]
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        problems.append(
            f"init_lora_weights = {init!r} changes the base that the adapter belongs to: convert it to a plain LoRA "
            "with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*ONLY, *READ, *HARMLESS, *SETTINGS, "init_lora_weights"}
    problems += [
        f"{name} = {value!r} is not supported"
        for name, value in sorted(config.items())
        if name not in known and value not in (None, False, {}, [])
    ]
    problems += setting_problems(config, model)
    if problems:
        raise ValueError(f"{folder / CONFIG}:\n  " + "\n  ".join(problems))


def _stacked(
    folder: Path, entries: list[TensorEntry], model: ModelConfig, leaves: Sequence[str], wrong_tables: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Layers of each projection as one array in f32, from all of them; those of `leaves` that PEFT transposes, back.

    What is wrong with tables is told with what is wrong here.
    """
    matches = {entry.name: KEY.fullmatch(entry.name) for entry in entries}
    by_key = {(match["module"], OURS[match["leaf"]]): e for e in entries if (match := matches[e.name])}
    problems = wrong_tables + [f"{name}: no part of such an adapter" for name, match in matches.items() if not match]
    lora: dict[str, dict[str, np.ndarray]] = {}
    for inner, (shape, _) in model.linear_shapes().items():
        name = f"model.layers.{inner}"
        modules = [model.hugging_face_name(layer_name(name, layer)) for layer in range(model.num_layers)]
        found = {leaf: [by_key.pop((module, leaf), None) for module in modules] for leaf in leaves}
        if any(entry is not None for entries in found.values() for entry in entries):
            problems += (wrong := _problems(modules, found, shape))
            lora[name] = {} if wrong else {leaf: _stack(leaf, found[leaf]) for leaf in leaves}
    problems += [
        f"{module}.{LEAF_NAMES[leaf]}: no linear layer of the model, or no part of such an adapter"
        for module, leaf in sorted({(LAYER.sub(".layers.*.", module), leaf) for module, leaf in by_key})
    ]
    if problems or not lora:
        lines = problems or ["no part of an adapter in it"]
        raise ValueError(f"{folder / WEIGHTS} does not fit the model:\n  " + "\n  ".join(lines))
    return lora


Found = Mapping[str, Sequence[TensorEntry | None]]  # by our leaf, of each layer


def _problems(modules: list[str], found: Found, shape: tuple[int, int]) -> list[str]:
    absent = [
        f"{module}.{LEAF_NAMES[leaf]} is missing: all layers of a projection are adapted alike here"
        for leaf, entries in found.items()
        for module, entry in zip(modules, entries, strict=True)
        if entry is None
    ]
    if absent:
        return absent
    name = LAYER.sub(".layers.*.", modules[0])
    first = {leaf: entries[0].shape for leaf, entries in found.items() if entries[0] is not None}
    ranks = {entry.shape[0] for entry in found.get("lora_a", ()) if entry is not None}
    if len(ranks) > 1:
        return [f"{name}: ranks {sorted(ranks)} in its layers; one for all is supported"]
    expected = _expected(first, shape)
    return [
        f"{entry.name}: shape {list(entry.shape)}, expected {list(expected[leaf])}"
        for leaf, entries in found.items()
        for entry in entries
        if entry is not None and entry.shape != expected[leaf]
    ]


def _expected(first: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes that go with those of the first layer."""
    n, k = shape
    if "vector" in first:
        return {"vector": (1, k) if first["vector"] == (1, k) else (n, 1)}
    rank = first["lora_a"][0]
    return {"lora_a": (rank, k), "lora_b": (n, rank), "magnitude": (n,)}


def _stack(leaf: str, entries: Sequence[TensorEntry | None]) -> np.ndarray:
    arrays = [np.asarray(entry.read(), np.float32) for entry in entries if entry is not None]
    return np.stack([array.T if leaf in MATRICES else array for array in arrays])


SCALING = ("method", "rank", "alpha", "use_rslora", "rank_pattern", "alpha_pattern")

IA3_SETTINGS = ("target_modules", "feedforward_modules")


def read_start(folder: Path, model: ModelConfig, args: LoraArgs, new_ids: tuple[int, ...]) -> Lora:
    """The parameters of the adapter in a folder, for training with these settings to go on from.

    Args:
      new_ids: of the run's new tokens.

    Raises:
      ValueError: settings or new tokens that are not the adapter's, each with the adapter's own; or whole tables that
        are not to train.
    """
    adapter = read_adapter(folder, model)
    if missing := adapter.tables.keys() - set(trainable_table_names(model, args)):
        raise ValueError(
            f"lora.start={folder}: it holds {' and '.join(sorted(missing))} whole: name them in lora.modules_to_save, "
            "and they train on; or merge it (python -m qlora_jax.export FOLDER --format hf), and train on that model"
        )
    if adapter.new_ids not in ((), new_ids):
        raise ValueError(
            f"lora.start={folder}: it has rows of the tokens {list(adapter.new_ids)}; model.new_tokens are "
            f"{list(new_ids) or 'none'}: name the adapter's tokens, in their order"
        )
    wrong = [
        f"lora.{name}: {getattr(args, name)!r}, in the adapter {getattr(adapter.args, name)!r}"
        for name in SCALING
        if getattr(args, name) != getattr(adapter.args, name)
    ]
    if args.method == adapter.args.method == "ia3" and ia3_targets(model, args) != ia3_targets(model, adapter.args):
        wrong += [f"lora.{name}: in the adapter {getattr(adapter.args, name)!r}" for name in IA3_SETTINGS]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(f"lora.start={folder}: give the adapter's own settings, for it was scaled by them:\n  {lines}")
    return {**adapter.lora, **{name: {"weight": table} for name, table in adapter.tables.items()}}


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
