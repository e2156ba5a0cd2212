"""Reads a PEFT adapter folder: LoRA parameters and their settings.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.hf.hub import hub_name_of
from qlora_jax.io.hf.reader import read_header
from qlora_jax.io.model_source import TensorEntry
from qlora_jax.io.peft.config import AdapterConfig, read_adapter_config
from qlora_jax.io.peft.embeddings import SETTINGS, read_tables, setting_problems
from qlora_jax.io.peft.norms import PEFT_TYPE, norm_suffixes, our_norm_names, read_norms
from qlora_jax.io.peft.writer import LEAVES, PREFIX, VECTOR, AdapterArrays, target_suffixes
from qlora_jax.io.tensor_map import LAYER, layer_name
from qlora_jax.metadata import shorten, shorten_key
from qlora_jax.models.add_adapters import ia3_targets
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.trainable_embeddings import trainable_table_names
from qlora_jax.patterns import pattern_problems

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Settings that do not change the computation; the tensors show which modules are targets.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "peft_version", "revision"),
    *("fan_in_fan_out", "loftq_config", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("target_modules", "task_type", "eva_config", "corda_config", "init_ia3_weights", "feedforward_modules"),
}
READ_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# Initial values that leave the base unchanged; others (PiSSA, OLoRA, LoftQ, CorDA) move a part of it to the adapter.
INITS = (True, False, "gaussian", "orthogonal", "eva")
SUPPORTED_VALUES = {"peft_type": ("LORA", "IA3", PEFT_TYPE), "bias": ("none",)}
MATRICES = ("lora_a", "lora_b")
LEAVES_OF_METHOD = {"lora": MATRICES, "dora": (*MATRICES, "magnitude"), "ia3": ("vector",)}
LEAF_NAMES = {ours: theirs for ours, (theirs, _) in LEAVES.items()} | {"vector": VECTOR}
OURS = {theirs: ours for ours, theirs in LEAF_NAMES.items()}
Read = tuple[dict[str, dict[str, np.ndarray]], LoraArgs]  # an adapter's LoRA parameters, and the settings of `add_lora`
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<leaf>{'|'.join(map(re.escape, OURS))})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """The contents of a PEFT adapter folder.

    Attributes:
      args: settings with which `add_lora` creates adapters of these shapes and scalings.
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}} in f32, by our names; with
        "magnitude" [L, N] for DoRA; {"vector": [L, N or K]} for (IA)^3; {"gain": [L, D]} of norms, and "bias" of
        LayerNorms; {"rows": [N, D]} of embedding and head.
      new_ids: ids of the tokens that these rows belong to.
      tables: embedding and head that replace the base's, if they were trained whole.
      base: path or name of the base model when the adapter was trained; None if the config does not say.
    """

    args: LoraArgs
    lora: dict[str, dict[str, np.ndarray]]
    base: str | None
    new_ids: tuple[int, ...]
    tables: dict[str, np.ndarray]


def is_adapter(folder: Path) -> bool:
    """True if a folder contains a PEFT adapter."""
    return (folder / CONFIG).is_file()


def base_model_of(folder: Path) -> str | None:
    """The path or name of an adapter's base model; a Hub name includes the revision, if the adapter has one."""
    config = read_adapter_config(folder / CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    on_hub = hub_name_of(base) if base and revision else None
    return str(dataclasses.replace(on_hub, revision=revision)) if on_hub else base


def read_adapter(folder: Path, model: ModelConfig) -> PeftAdapter:
    """Reads the adapter in a folder for a model with these features.

    Raises:
      ValueError: the adapter's type or settings are not supported (all problems are named), or its tensors do not fit
        the model (all problems are named).
    """
    config = read_adapter_config(folder / CONFIG)
    _check_settings(folder, config, model)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(_no_weights(folder))
    tables, tensors, wrong = read_tables(config, list(read_header(folder / WEIGHTS)), model)
    lora, args = READERS[_kind(config)](folder, config, tensors, model, wrong)
    base = config.get("base_model_name_or_path")
    return PeftAdapter(args=args, lora=lora | tables.rows, base=base, new_ids=tables.ids, tables=tables.whole)


def _kind(config: AdapterConfig) -> str:
    return config.get("peft_type") or "LORA"


def _suffixes(names: Iterable[str], model: ModelConfig) -> list[str]:
    linears = [model.hugging_face_name(f"model.layers.{name}") for name in model.linear_shapes()]
    return target_suffixes([model.hugging_face_name(name) for name in names], linears)


def _read_low_rank(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    method = "dora" if config.get("use_dora") else "lora"
    lora = _stacked(folder, tensors, model, LEAVES_OF_METHOD[method], wrong)
    return lora, _low_rank_args(config, lora, model)


def _read_ia3(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    stacks = _stacked(folder, tensors, model, LEAVES_OF_METHOD["ia3"], wrong)
    lora = {name: {"vector": leaves["vector"].reshape(model.num_layers, -1)} for name, leaves in stacks.items()}
    return lora, _ia3_args(stacks, model)


def _read_norms(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    named, problems = read_norms(tensors, model)
    _check(folder, wrong + problems)
    ours = our_norm_names(model)
    args = LoraArgs(method="ln_tuning", target_modules=norm_suffixes(list(named), model))
    return {ours[name]: leaves for name, leaves in named.items()}, args


# By peft_type; each takes (folder, config, tensors but those of tables, model, problems of tables).
READERS: dict[str, Callable[[Path, AdapterConfig, list[TensorEntry], ModelConfig, list[str]], Read]] = {
    "LORA": _read_low_rank,
    "IA3": _read_ia3,
    PEFT_TYPE: _read_norms,
}


def _low_rank_args(config: AdapterConfig, lora: AdapterArrays, model: ModelConfig) -> LoraArgs:
    assert "r" in config and "lora_alpha" in config  # _check_settings
    return LoraArgs(
        method="dora" if config.get("use_dora") else "lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        target_modules=_suffixes(lora, model),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
        use_rslora=bool(config.get("use_rslora")),
    )


def _ia3_args(lora: AdapterArrays, model: ModelConfig) -> LoraArgs:
    """The settings of an (IA)^3 adapter: inputs are scaled if a stack is [L, 1, K], outputs if it is [L, N, 1]."""
    on_inputs = [name for name, leaves in lora.items() if leaves["vector"].shape[1] == 1]
    return LoraArgs(
        method="ia3", target_modules=_suffixes(lora, model), feedforward_modules=_suffixes(on_inputs, model)
    )


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE).is_file():
        return (
            f"{folder}: {PICKLE} is a pickle, which is not read because it can run any code. If you trust it, convert "
            "it with peft: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )
    return f"{folder}: {WEIGHTS} is missing (found {CONFIG}). Copy it from where the adapter was trained"


def _check_settings(folder: Path, config: AdapterConfig, model: ModelConfig) -> None:
    problems = [
        f"{name}: found {shorten(config[name])}, expected {' or '.join(map(repr, possible))}"
        for name, possible in SUPPORTED_VALUES.items()
        if name in config and config[name] not in possible
    ]
    if _kind(config) == "LORA":
        problems += [f"{name} is missing" for name in ("r", "lora_alpha") if name not in config]
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        problems.append(
            f"init_lora_weights: {shorten(init)} changes the base. Convert the adapter to a plain LoRA with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*SUPPORTED_VALUES, *READ_SETTINGS, *HARMLESS, *SETTINGS, "init_lora_weights"}
    problems += [
        f"{shorten_key(name)}: {shorten(value)} is not supported"
        for name, value in sorted(config.items())
        if name not in known and value not in (None, False, {}, [])
    ]
    problems += setting_problems(config, model) + _pattern_problems(config)
    if problems:
        raise ValueError(f"{folder / CONFIG}:\n  " + "\n  ".join(problems))


def _pattern_problems(config: AdapterConfig) -> list[str]:
    patterns = {"rank_pattern": config.get("rank_pattern"), "alpha_pattern": config.get("alpha_pattern")}
    return [
        f"{name}: {shorten(pattern)}: {problem}"
        for name, values in patterns.items()
        for pattern in values or ()
        for problem in pattern_problems(pattern)
    ]


def _stacked(
    folder: Path, entries: list[TensorEntry], model: ModelConfig, leaves: Sequence[str], wrong_tables: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Stacks the layers of each projection into f32 arrays in our orientation.

    Args:
      leaves: our names of the leaves that the adapter's method has.
      wrong_tables: problems of embedding and head, which are reported together with those found here.

    Raises:
      ValueError: tensors do not fit the model; all problems are named.
    """
    matches = {entry.name: KEY.fullmatch(entry.name) for entry in entries}
    by_key = {(match["module"], OURS[match["leaf"]]): e for e in entries if (match := matches[e.name])}
    problems = wrong_tables + [
        f"{name}: unexpected in an adapter of this method" for name, match in matches.items() if not match
    ]
    lora: dict[str, dict[str, np.ndarray]] = {}
    for inner, (shape, _) in model.linear_shapes().items():
        name = f"model.layers.{inner}"
        modules = [model.hugging_face_name(layer_name(name, layer)) for layer in range(model.num_layers)]
        found = {leaf: [by_key.pop((module, leaf), None) for module in modules] for leaf in leaves}
        if any(entry is not None for entries in found.values() for entry in entries):
            problems += (wrong := _problems(modules, found, shape))
            lora[name] = {} if wrong else {leaf: _stack(leaf, found[leaf]) for leaf in leaves}
    problems += [
        f"{module}.{LEAF_NAMES[leaf]}: not a linear layer of the model, or unexpected in an adapter of this method"
        for module, leaf in sorted({(LAYER.sub(".layers.*.", module), leaf) for module, leaf in by_key})
    ]
    _check(folder, problems or ([] if lora else ["it has no tensor of an adapter"]))
    return lora


def _check(folder: Path, problems: Sequence[str]) -> None:
    """Raises ValueError if there are problems."""
    if problems:
        raise ValueError(f"{folder / WEIGHTS} does not fit the model:\n  " + "\n  ".join(problems))


Found = Mapping[str, Sequence[TensorEntry | None]]  # the entry of each layer, by our name of the leaf


def _problems(modules: list[str], found: Found, shape: tuple[int, int]) -> list[str]:
    missing = [
        f"{module}.{LEAF_NAMES[leaf]} is missing: all layers of a projection must have an adapter"
        for leaf, entries in found.items()
        for module, entry in zip(modules, entries, strict=True)
        if entry is None
    ]
    if missing:
        return missing
    name = LAYER.sub(".layers.*.", modules[0])
    first = {leaf: entries[0].shape for leaf, entries in found.items() if entries[0] is not None}
    ranks = {entry.shape[0] for entry in found.get("lora_a", ()) if entry is not None}
    if len(ranks) > 1:
        return [f"{name}: its layers have different ranks (found {sorted(ranks)}), which is not supported"]
    expected = _expected(first, shape)
    return [
        f"{entry.name}: shape {list(entry.shape)}, expected {list(expected[leaf])}"
        for leaf, entries in found.items()
        for entry in entries
        if entry is not None and entry.shape != expected[leaf]
    ]


def _expected(first: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The expected shapes, given those of the first layer."""
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


def read_start_adapter(folder: Path, model: ModelConfig, args: LoraArgs, new_ids: tuple[int, ...]) -> AdapterArrays:
    """Reads the parameters of an adapter from which training starts (lora.start).

    Args:
      args: the settings of the new run.
      new_ids: ids of the run's new tokens.

    Raises:
      ValueError: settings or new tokens differ from the adapter's (all are named with both values), or the adapter has
        whole tables that the run does not train.
    """
    adapter = read_adapter(folder, model)
    if missing := adapter.tables.keys() - set(trainable_table_names(model, args)):
        raise ValueError(
            f"lora.start={folder}: it contains all of {' and '.join(sorted(missing))}. Add them to "
            "lora.modules_to_save to train them further; or merge it (python -m qlora_jax.export --run FOLDER --format "
            "hf) and train that model"
        )
    if adapter.new_ids not in ((), new_ids):
        raise ValueError(
            f"lora.start={folder}: its new tokens differ from model.new_tokens (found {list(adapter.new_ids)}, "
            f"expected {list(new_ids) or 'none'}). Set model.new_tokens to the adapter's tokens in order"
        )
    wrong = [
        f"lora.{name}: found {getattr(args, name)!r}, expected {getattr(adapter.args, name)!r}"
        for name in SCALING
        if getattr(args, name) != getattr(adapter.args, name)
    ]
    if args.method == adapter.args.method == "ia3" and ia3_targets(model, args) != ia3_targets(model, adapter.args):
        wrong += [f"lora.{name}: expected {getattr(adapter.args, name)!r}" for name in IA3_SETTINGS]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(
            f"lora.start={folder}: settings differ from the adapter's. Use those it was trained with:\n  {lines}"
        )
    return {**adapter.lora, **{name: {"weight": table} for name, table in adapter.tables.items()}}


def check_shapes(path: Path, lora: AdapterArrays, expected: AdapterArrays) -> None:
    """Checks that an adapter has the expected projections and shapes.

    Raises:
      ValueError: names every projection that differs.
    """
    found, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (lora, expected))
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if names:
        lines = "\n".join(f"  {name}: found {found.get(name)}, expected {wanted.get(name)}" for name in names)
        raise ValueError(f"{path}: the adapter does not fit the model:\n{lines}")
