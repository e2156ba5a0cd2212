"""Writes adapters in PEFT's format: adapter_model.safetensors, adapter_config.json and a README.

Dimension key: L layers, K in, R rank, N out.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors.numpy import save

from qlora_jax.atomic_files import write_bytes, write_text
from qlora_jax.config import LoraArgs
from qlora_jax.io.head_file import TrainedHead, write_head
from qlora_jax.io.head_padding import Padding
from qlora_jax.io.peft.readme import readme
from qlora_jax.metadata import JsonObject
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.regex import matches_end

PREFIX = "base_model.model."
# Modules that have an adapter only in some layers: {name without the layer's index: those layers, ascending}.
SomeLayers = Mapping[str, Sequence[int]]
EVERY_LAYER: SomeLayers = MappingProxyType({})
NO_PARAMETERS: Mapping[str, Sequence[str]] = MappingProxyType({})

# Our leaf -> (PEFT's name, the change of one layer's values).
LEAVES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "lora_a": ("lora_A.weight", np.transpose),
    "lora_b": ("lora_B.weight", np.transpose),
    "magnitude": ("lora_magnitude_vector", np.asarray),
    "oft_r": ("oft_R.weight", np.asarray),
    "lambda_b": ("vera_lambda_b", np.asarray),
    "lambda_d": ("vera_lambda_d", np.asarray),
}
VECTOR = "ia3_l"


def adapter_tensors(
    lora: AdapterArrays, on_inputs: Collection[str] = (), some_layers: SomeLayers = EVERY_LAYER
) -> dict[str, np.ndarray]:
    """The tensors of adapter_model.safetensors, for each layer of each module.

    LoRA has lora_A.weight [R, K] and lora_B.weight [N, R], the transposes of our A and B. DoRA adds
    lora_magnitude_vector [N]. (IA)^3 has ia3_l [N, 1], or [1, K] if it scales inputs. OFT has oft_R.weight, our array;
    VeRA has vera_lambda_b [N] and vera_lambda_d [R].

    Args:
      lora: {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}.
      on_inputs: modules whose inputs (IA)^3 scales.
      some_layers: modules that have an adapter only in some layers.
    """
    tensors = {}
    for name, leaves in lora.items():
        vector = (VECTOR, (lambda v: v[None]) if name in on_inputs else (lambda v: v[:, None]))
        for leaf, stack in leaves.items():
            peft_name, convert = LEAVES.get(leaf, vector)
            for layer, values in zip(some_layers.get(name, range(len(stack))), np.asarray(stack), strict=True):
                tensors[f"{PREFIX}{layer_name(name, layer)}.{peft_name}"] = np.ascontiguousarray(convert(values))
    return tensors


def adapter_config(
    lora: AdapterArrays,
    args: LoraArgs,
    linears: Iterable[str],
    base: str,
    on_inputs: Collection[str] = (),
    some_layers: SomeLayers = EVERY_LAYER,
    parameters: Mapping[str, Sequence[str]] = NO_PARAMETERS,
) -> JsonObject:
    """The adapter_config.json from which PEFT builds the trained adapter with the same scaling.

    rsLoRA's scaling is written as an alpha, because not every reader supports rsLoRA.

    Args:
      lora: LoRA parameters by Hugging Face's names without the layer's index.
      args: the settings of training.
      linears: names of all linear layers, also of those without an adapter.
      base: where PEFT finds the base model: a path or a name.
      on_inputs: modules whose inputs (IA)^3 scales.
      some_layers: modules that have an adapter only in some layers.
      parameters: target_parameters of the modules that PEFT does not find in target_modules.

    Raises:
      ValueError: a module's rank differs from its settings.
    """
    linears, modules = list(linears), [name for name in lora if name not in parameters]
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        **target_settings(modules, linears, some_layers),
    }
    if parameters:
        common["target_parameters"] = sorted(entry for entries in parameters.values() for entry in entries)
    if args.method == "ia3":
        feedforward = target_suffixes(sorted(on_inputs), linears)
        return common | {"peft_type": "IA3", "feedforward_modules": feedforward, "init_ia3_weights": True}
    if args.method in CONFIGS:
        return common | CONFIGS[args.method](args)
    return common | _low_rank_config(lora, args, linears, some_layers, parameters)


def _oft_config(args: LoraArgs) -> JsonObject:
    return {
        "peft_type": "OFT",
        "r": args.oft_blocks,
        "oft_block_size": 0 if args.oft_blocks else args.oft_block_size,
        "block_share": args.block_share,
        "use_cayley_neumann": args.use_cayley_neumann,
        "num_cayley_neumann_terms": args.num_cayley_neumann_terms,
        "module_dropout": 0.0,
        "coft": False,
        "bias": "none",
        "init_weights": True,
        "peft_version": OFT_VERSION,
    }


def _vera_config(args: LoraArgs) -> JsonObject:
    return {
        "peft_type": "VERA",
        "r": args.rank,
        "vera_dropout": args.dropout,
        "projection_prng_key": args.projection_prng_key,
        "save_projection": True,
        "d_initial": args.d_initial,
        "bias": "none",
        "init_weights": True,
    }


OFT_VERSION = "0.18.0"  # the first with this series, which PEFT warns about unless the file names such a version
CONFIGS: dict[str, Callable[[LoraArgs], JsonObject]] = {"oft": _oft_config, "vera": _vera_config}


def _low_rank_config(
    lora: AdapterArrays,
    args: LoraArgs,
    linears: Sequence[str],
    some_layers: SomeLayers,
    parameters: Mapping[str, Sequence[str]],
) -> JsonObject:
    _check_ranks(lora, args, some_layers)
    alpha, alpha_pattern = _alphas(lora, args, linears, some_layers)
    ranks = {name: matrices["lora_a"].shape[-1] for name, matrices in lora.items()}
    alphas = effective_alphas(lora, args, some_layers)
    # PEFT matches patterns with the names of parameters, which ours need not end like.
    exactly = [(re.escape(entry), name) for name, entries in parameters.items() for entry in entries]
    alpha_pattern |= {entry: alphas[name] for entry, name in exactly if alphas[name] != alpha}
    return {
        "peft_type": "LORA",
        "r": args.rank,
        "lora_alpha": _integer_if_whole(alpha),
        # PEFT has no dropout on parameters, and refuses it for all modules then; it does not act in inference.
        "lora_dropout": 0.0 if parameters else args.dropout,
        "use_rslora": False,
        "use_dora": args.method == "dora",
        "rank_pattern": dict(args.rank_pattern) | {e: ranks[name] for e, name in exactly if ranks[name] != args.rank},
        "alpha_pattern": {pattern: _integer_if_whole(value) for pattern, value in alpha_pattern.items()},
        "bias": "none",
        "init_lora_weights": True,
    }


def _alphas(
    lora: AdapterArrays, args: LoraArgs, linears: Sequence[str], some_layers: SomeLayers
) -> tuple[float, dict[str, float]]:
    """(alpha, alpha by pattern) to divide by the rank: rsLoRA's alpha / sqrt(rank) is alpha sqrt(rank) / rank."""
    if not args.use_rslora:
        return args.alpha, dict(args.alpha_pattern)
    whole, each = args.alpha * math.sqrt(args.rank), effective_alphas(lora, args, some_layers)
    return whole, {target_suffixes([name], linears)[0]: alpha for name, alpha in each.items() if alpha != whole}


def effective_alphas(lora: AdapterArrays, args: LoraArgs, some_layers: SomeLayers = EVERY_LAYER) -> dict[str, float]:
    """The alpha of each module whose quotient with the rank is the scaling: alpha, or rsLoRA's alpha sqrt(rank)."""
    ranks = {name: matrices["lora_a"].shape[-1] for name, matrices in lora.items()}
    return {
        name: _first_match(args.alpha_pattern, name, args.alpha, some_layers)
        * (math.sqrt(rank) if args.use_rslora else 1)
        for name, rank in ranks.items()
    }


def _first_match[Value: (int, float)](
    patterns: Mapping[str, Value], name: str, default: Value, some_layers: SomeLayers
) -> Value:
    """PEFT's value for a module: the value of the first pattern that matches the end of its full name."""
    first = layer_name(name, some_layers.get(name, (0,))[0])
    matching = (p for p in patterns if matches_end(p, first))
    return patterns.get(next(matching, ""), default)


def target_settings(names: Sequence[str], linears: Sequence[str], some_layers: SomeLayers) -> JsonObject:
    """Returns the settings that target these modules, in PEFT and here: target_modules and layers_to_transform.

    If modules have adapters on different layers, each layer's module is named.
    """
    chosen = {tuple(some_layers.get(name, ())) for name in names}
    if len(chosen) == 1:
        (layers,) = chosen
        some = {"layers_to_transform": list(layers)} if layers else {}
        return {"target_modules": target_suffixes(names, linears), **some}
    on_all = target_suffixes([name for name in names if name not in some_layers], linears)
    by_layer = [layer_name(name, layer) for name in names for layer in some_layers.get(name, ())]
    return {"target_modules": [*on_all, *by_layer]}


def target_suffixes(targets: Sequence[str], linears: Sequence[str]) -> list[str]:
    """The shortest suffix of each target's name that matches no linear layer outside `targets`; sorted and unique."""
    others = [name for name in linears if name not in targets]
    suffixes = set()
    for name in targets:
        parts = layer_name(name, 0).split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        suffixes.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(suffixes)


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
    write_bytes(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
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


def _check_ranks(lora: AdapterArrays, args: LoraArgs, some_layers: SomeLayers) -> None:
    wrong = []
    for name, matrices in lora.items():
        expected = _first_match(args.rank_pattern, name, args.rank, some_layers)
        found = matrices["lora_a"].shape[-1]
        if found != expected:
            wrong.append(f"{name} has rank {found}, expected {expected}")
    if wrong:
        raise ValueError(f"the LoRA's ranks differ from the run's settings: {'; '.join(wrong)}")


def _integer_if_whole(number: float) -> float | int:
    """Returns 32 for 32.0, because PEFT writes alpha as an integer."""
    return int(number) if float(number).is_integer() else number
