"""Reads a PEFT adapter folder: LoRA parameters and their settings.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.head_file import TrainedHead
from qlora_jax.io.hf.hub import hub_name_of
from qlora_jax.io.hf.reader import read_header
from qlora_jax.io.peft.config import AdapterConfig, read_adapter_config
from qlora_jax.io.peft.embeddings import SETTINGS, read_tables, setting_problems
from qlora_jax.io.peft.head_adapters import head_modules, named_as_causal, read_score, without_lm_head
from qlora_jax.io.peft.multimodal import with_current_names
from qlora_jax.io.peft.norms import PEFT_TYPE, norm_suffixes, our_norm_names, read_norms
from qlora_jax.io.peft.projections import NAMES, read_projections
from qlora_jax.io.peft.stacks import LEAVES_OF_METHOD, WEIGHTS, check_fits, stack_layers
from qlora_jax.io.peft.target_parameters import entries_of, own_patterns, read_parameters
from qlora_jax.io.peft.targets import targeted_layers
from qlora_jax.io.peft.writer import SomeLayers, target_settings, target_suffixes
from qlora_jax.metadata import shorten, shorten_key
from qlora_jax.methods.oft import oft_blocks
from qlora_jax.methods.vera import Projections
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.regex import file_pattern_problems

CONFIG, PICKLE = "adapter_config.json", "adapter_model.bin"
# Settings that do not change the computation; the tensors show which modules are targets.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "peft_version", "revision"),
    *("fan_in_fan_out", "loftq_config", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("target_modules", "task_type", "eva_config", "corda_config", "init_ia3_weights", "feedforward_modules"),
    *("init_weights", "eps", "d_initial"),  # eps: used only by coft
    "layers_pattern",  # a model here has one stack of layers
}
READ_SETTINGS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    *("vera_dropout", "projection_prng_key", "save_projection"),
)
# Initial values that leave the base unchanged; others (PiSSA, OLoRA, LoftQ, CorDA) move a part of it to the adapter.
INITS = (True, False, "gaussian", "orthogonal", "eva")
SUPPORTED_VALUES = {"peft_type": ("LORA", "IA3", "OFT", "VERA", PEFT_TYPE), "bias": ("none",)}
Read = tuple[dict[str, dict[str, np.ndarray]], LoraArgs]  # an adapter's LoRA parameters, and the settings of `add_lora`


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """The contents of a PEFT adapter folder.

    Attributes:
      args: settings with which `add_lora` creates adapters of these shapes and scalings.
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}} in f32, by our names; with
        "magnitude" [L, N] for DoRA; {"vector": [L, N or K]} for (IA)^3; {"oft_r": [L, C, E]} for OFT; {"lambda_b":
        [L, N], "lambda_d": [L, R]} for VeRA; {"gain": [L, D]} of norms, and "bias" of LayerNorms; {"rows": [N, D]} of
        embedding and head.
      new_ids: ids of the tokens that these rows belong to.
      tables: embedding and head that replace the base's, if they were trained whole.
      base: path or name of the base model when the adapter was trained; None if the config does not say.
      projections: VeRA's A and B, if they are not those of its settings.
      head: the sequence head, if the adapter has one; its matrix is in `lora`.
    """

    args: LoraArgs
    lora: dict[str, dict[str, np.ndarray]]
    base: str | None
    new_ids: tuple[int, ...]
    tables: dict[str, np.ndarray]
    projections: Projections | None = None
    head: TrainedHead | None = None


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
    entries = named_as_causal(config, with_current_names(list(read_header(folder / WEIGHTS)), model), model)
    head, score, entries, wrong_head = read_score(folder, config, entries, model)
    tables, tensors, wrong = read_tables(config, entries, without_lm_head(config, model))
    lora, args = READERS[_kind(config)](folder, config, tensors, model, wrong_head + wrong)
    return PeftAdapter(
        args=args,
        lora=lora | tables.rows | score,
        base=config.get("base_model_name_or_path"),
        new_ids=tables.ids,
        tables=tables.whole,
        projections=read_projections(folder, config, tensors, lora, args, model) if args.method == "vera" else None,
        head=head,
    )


def _kind(config: AdapterConfig) -> str:
    return config.get("peft_type") or "LORA"


def linears_of(model: ModelConfig) -> list[str]:
    """Returns the names of a layer's projections in Hugging Face's spelling."""
    return [model.hugging_face_name(f"model.layers.{name}") for name in model.linear_shapes()]


def _suffixes(names: Iterable[str], model: ModelConfig) -> list[str]:
    return target_suffixes([model.hugging_face_name(name) for name in names], linears_of(model))


def _read_low_rank(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    if config.get("use_dora"):
        lora, some_layers = stack_layers(folder, tensors, model, LEAVES_OF_METHOD["dora"], wrong), {}
    else:
        parameters = read_parameters(config.get("target_parameters") or (), tensors, model)
        some_layers = targeted_layers(config, model) | parameters.layers
        wrong, given = wrong + parameters.problems, bool(parameters.lora)
        lora = stack_layers(folder, parameters.rest, model, LEAVES_OF_METHOD["lora"], wrong, some_layers, given=given)
        lora |= parameters.lora
    return lora, _low_rank_args(config, lora, some_layers, model)


def _read_oft(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    lora = stack_layers(folder, tensors, model, LEAVES_OF_METHOD["oft"], wrong)
    args = _oft_args(config, lora, model)
    try:
        oft_blocks(model, args)
    except ValueError as error:
        check_fits(folder, [str(error)])
    return lora, args


def _read_vera(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    layers = [entry for entry in tensors if entry.name not in NAMES]
    lora = stack_layers(folder, layers, model, LEAVES_OF_METHOD["vera"], wrong)
    return lora, _vera_args(config, lora, model)


def _read_ia3(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    stacks = stack_layers(folder, tensors, model, LEAVES_OF_METHOD["ia3"], wrong)
    lora = {name: {"vector": leaves["vector"].reshape(model.num_layers, -1)} for name, leaves in stacks.items()}
    return lora, _ia3_args(stacks, model)


def _read_norms(
    folder: Path, config: AdapterConfig, tensors: list[TensorEntry], model: ModelConfig, wrong: list[str]
) -> Read:
    named, problems = read_norms(tensors, model)
    check_fits(folder, wrong + problems)
    ours = our_norm_names(model)
    args = LoraArgs(method="ln_tuning", target_modules=norm_suffixes(list(named), model))
    return {ours[name]: leaves for name, leaves in named.items()}, args


# By peft_type; each takes (folder, config, tensors but those of tables, model, problems of tables).
READERS: dict[str, Callable[[Path, AdapterConfig, list[TensorEntry], ModelConfig, list[str]], Read]] = {
    "LORA": _read_low_rank,
    "IA3": _read_ia3,
    "OFT": _read_oft,
    "VERA": _read_vera,
    PEFT_TYPE: _read_norms,
}


def _low_rank_args(config: AdapterConfig, lora: AdapterArrays, some_layers: SomeLayers, model: ModelConfig) -> LoraArgs:
    layers_of = {model.hugging_face_name(name): layers for name, layers in some_layers.items()}
    names = [model.hugging_face_name(name) for name in lora]
    modules = [name for name in names if name in linears_of(model)]
    assert "r" in config and "lora_alpha" in config  # _check_settings
    ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    if config.get("target_parameters"):
        every = {model.hugging_face_name(name): leaves["lora_a"].shape[-1] for name, leaves in lora.items()}
        ranks, alphas = own_patterns(config, every, layers_of, model)
    return LoraArgs(
        method="dora" if config.get("use_dora") else "lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        **target_settings(modules, linears_of(model), layers_of),
        target_parameters=entries_of([name for name in names if name not in modules], layers_of, model),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=bool(config.get("use_rslora")),
    )


def _ia3_args(lora: AdapterArrays, model: ModelConfig) -> LoraArgs:
    """The settings of an (IA)^3 adapter: inputs are scaled if a stack is [L, 1, K], outputs if it is [L, N, 1]."""
    on_inputs = [name for name, leaves in lora.items() if leaves["vector"].shape[1] == 1]
    return LoraArgs(
        method="ia3", target_modules=_suffixes(lora, model), feedforward_modules=_suffixes(on_inputs, model)
    )


def _oft_args(config: AdapterConfig, lora: AdapterArrays, model: ModelConfig) -> LoraArgs:
    series, plain = config.get("use_cayley_neumann", True), LoraArgs()
    terms = config.get("num_cayley_neumann_terms", plain.num_cayley_neumann_terms)
    return LoraArgs(
        method="oft",
        target_modules=_suffixes(lora, model),
        oft_blocks=config.get("r", 0),
        oft_block_size=config.get("oft_block_size") or plain.oft_block_size,
        block_share=bool(config.get("block_share")),
        use_cayley_neumann=bool(series),
        num_cayley_neumann_terms=terms if series else plain.num_cayley_neumann_terms,
    )


def _vera_args(config: AdapterConfig, lora: AdapterArrays, model: ModelConfig) -> LoraArgs:
    assert "r" in config  # _check_settings
    return LoraArgs(
        method="vera",
        rank=config["r"],
        dropout=config.get("vera_dropout") or 0.0,
        target_modules=_suffixes(lora, model),
        projection_prng_key=config.get("projection_prng_key", 0),
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
    problems += [f"{name} is missing" for name in REQUIRED.get(_kind(config), ()) if name not in config]
    if _kind(config) in ("LORA", "VERA") and config.get("r") == 0:
        problems.append("r: found 0, expected at least 1")
    if _kind(config) == "OFT":
        problems += _oft_problems(config)
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        problems.append(
            f"init_lora_weights: {shorten(init)} changes the base. Convert the adapter to a plain LoRA with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    some_layers = {"layers_to_transform"} if _kind(config) == "LORA" and not config.get("use_dora") else set()
    parameters = {"target_parameters"} if some_layers and model.experts is not None else set()
    known = {*SUPPORTED_VALUES, *READ_SETTINGS, *HARMLESS, *SETTINGS, "init_lora_weights", *some_layers, *parameters}
    problems += [
        f"{shorten_key(name)}: {shorten(value)} is not supported"
        for name, value in sorted(config.items())
        if name not in known and value not in (None, False, {}, [])
    ]
    problems += setting_problems(config, without_lm_head(config, model), head_modules(config))
    problems += file_pattern_problems({name: config.get(name) or () for name in ("rank_pattern", "alpha_pattern")})
    if problems:
        raise ValueError(f"{folder / CONFIG}:\n  " + "\n  ".join(problems))


REQUIRED = {"LORA": ("r", "lora_alpha"), "OFT": ("oft_block_size",), "VERA": ("r",)}


def _oft_problems(config: AdapterConfig) -> list[str]:
    blocks, size, version = config.get("r", 0), config.get("oft_block_size", 0), config.get("peft_version")
    problems = []
    if bool(blocks) == bool(size) or size == 1:
        problems.append(f"r, oft_block_size: found {blocks} and {size}, expected one of them to be 0, the other above")
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version or "0.0")
    if config.get("use_cayley_neumann", True) and (numbers is None or tuple(map(int, numbers.groups())) < (0, 18)):
        problems.append(
            f"use_cayley_neumann: its series was another one before PEFT 0.18 (found peft_version {shorten(version)}). "
            "Train the adapter again"
        )
    return problems
