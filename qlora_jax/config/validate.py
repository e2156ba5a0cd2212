"""Validates a configuration: types, bounds, and settings that contradict each other."""

import dataclasses
from typing import NamedTuple

from qlora_jax.config.distillation import distillation_problems
from qlora_jax.config.exports import MIXTURES
from qlora_jax.config.methods import CONDITIONAL, MERGED_FOLDERS, METHODS, LoraArgs, methods_with, uses
from qlora_jax.config.objectives import OBJECTIVES, objective_problems
from qlora_jax.config.parse import ConfigError, find_problems, parse_layers
from qlora_jax.config.policy import policy_problems
from qlora_jax.config.question_settings import QUESTION_KINDS, question_problems, unknown_columns
from qlora_jax.config.rewards import reward_problems, tool_problems
from qlora_jax.config.row_formats import row_columns
from qlora_jax.config.schema import PAGED, Config, DataArgs, MeshSize, TrainArgs, mesh_sizes, paging_of, plain_name
from qlora_jax.config.sizes import parse_bytes


class MeshChoices(NamedTuple):
    """Candidate meshes of a run, in the order to try them, and the problems of those that it may not use."""

    usable: list[MeshSize]
    refused: dict[MeshSize, list[str]]


def mesh_choices(config: Config, devices: int) -> MeshChoices:
    """Returns the meshes that a run may use on this many devices.

    Raises:
      ConfigError: there is none; with all problems of the one that the settings name.
    """
    problems = {size: mesh_problems(config, size, devices) for size in mesh_sizes(config.mesh, devices)}
    usable = [size for size, found in problems.items() if not found]
    if not usable:
        raise ConfigError(next(iter(problems.values())))
    return MeshChoices(usable, {size: found for size, found in problems.items() if found})


def given_mesh_problems(config: Config) -> list[str]:
    """Describes why a run cannot use the mesh that its settings give, whatever devices there are."""
    data, fsdp = config.mesh.data, config.mesh.fsdp
    if isinstance(data, str) or isinstance(fsdp, str):
        return []
    size = MeshSize(data, fsdp)
    return mesh_problems(config, size, size.devices)


def mesh_problems(config: Config, size: MeshSize, devices: int) -> list[str]:
    """Describes why a run cannot use a mesh, one line per setting."""
    problems = [*_device_problems(size, devices), *_micro_batch_problems(config.train, size)]
    if size.fsdp > 1 and config.train.remat == "none":
        problems.append(
            f"train.remat: found 'none' with mesh.fsdp={size.fsdp}, expected another policy, because none keeps "
            "the whole weights of every layer. Set train.remat=names"
        )
    if size.devices > 1 and config.model.experts == "offload":
        problems.append(
            f"model.experts: found 'offload' on a mesh of {size.devices} devices, which does not support it yet. Set "
            "mesh.data=1 and mesh.fsdp=1, or model.experts=device"
        )
    if size.devices > 1:
        problems += [
            f"lora.{name}: found {value!r} on a mesh of {size.devices} devices, which does not support it yet. Set "
            f"mesh.data=1 and mesh.fsdp=1, or lora.{name}={'lora' if name == 'method' else 'default'}"
            for name, value, is_supported in (
                ("method", config.lora.method, METHODS[config.lora.method].on_mesh),
                ("init", config.lora.init, config.lora.init == "default"),
            )
            if not is_supported
        ]
    return problems


def _device_problems(size: MeshSize, devices: int) -> list[str]:
    if size.devices <= devices:
        return []
    found = f"found {size.data} x {size.fsdp} = {size.devices} devices"
    there = "there is one device" if devices == 1 else f"there are {devices} devices"
    return [f"mesh.data, mesh.fsdp: {found}, but {there}. Set sizes whose product is at most {devices}"]


def _micro_batch_problems(train: TrainArgs, size: MeshSize) -> list[str]:
    if train.micro_batch_size % size.devices == 0:
        return []
    found = f"found {train.micro_batch_size}, expected a multiple of {size.devices} (mesh.data {size.data} x mesh.fsdp "
    return [f"train.micro_batch_size: {found}{size.fsdp}). {_micro_batch_fix(train, size.devices)}"]


def _micro_batch_fix(train: TrainArgs, devices: int) -> str:
    """Returns the nearest sizes that divide; with the same rows per step, if there are any."""
    rows = train.micro_batch_size * train.accumulation
    same = [each for each in range(devices, rows + 1, devices) if rows % each == 0]
    if not same:
        more = -(-train.micro_batch_size // devices) * devices
        return f"Set train.micro_batch_size={more}, or a smaller mesh"
    nearest = min(same, key=lambda each: abs(each - train.micro_batch_size))
    return (
        f"Set train.micro_batch_size={nearest} and train.accumulation={rows // nearest}, which train on the same "
        f"{rows} rows per step"
    )


def _pattern_problems(config: Config) -> list[str]:
    patterns = {"lora.rank_pattern": config.lora.rank_pattern, "lora.alpha_pattern": config.lora.alpha_pattern}
    return [
        f"{key}: found {value!r} for {name!r}, expected more than 0"
        for key, pattern in patterns.items()
        for name, value in pattern.items()
        if value <= 0
    ]


def _method_problems(lora: LoraArgs) -> list[str]:
    """Reports settings that the method or the initialization ignores."""
    plain = LoraArgs()
    unused = {name: f"lora.method={lora.method}" for name in CONDITIONAL if not uses(lora.method, name)}
    if lora.init == "default":
        unused["svd_niter"] = "lora.init=default"
    if lora.init != "loftq":
        unused["loftq_iterations"] = f"lora.init={lora.init}"
    if lora.oft_blocks:
        unused["oft_block_size"] = f"lora.oft_blocks={lora.oft_blocks}"
    if not lora.use_cayley_neumann:
        unused["num_cayley_neumann_terms"] = "lora.use_cayley_neumann=false"
    problems = [
        f"lora.{name}: found {getattr(lora, name)!r}, but {why} does not use it. Remove this setting"
        for name, why in unused.items()
        if getattr(lora, name) != getattr(plain, name)
    ]
    declared = METHODS[lora.method]
    if declared.options is not None:
        problems += [f"lora.options.{problem}" for problem in find_problems(declared.options, lora.options, {})]
    elif lora.options:
        problems.append(
            f"lora.options: found {lora.options!r}, but lora.method={lora.method} has no options. Remove this setting"
        )
    if not declared.of_linears and lora.target_modules == "all-linear":
        problems.append(
            f"lora.target_modules: found 'all-linear' with lora.method={lora.method}, which does not train weights of "
            "linear layers. Remove this setting, or name the modules"
        )
    return problems


def _merge_problems(config: Config) -> list[str]:
    """Reports settings that training with merged weights does not support."""
    lora, model = config.lora, config.model
    problems = []
    if lora.merge_types and lora.merge_into not in MIXTURES:
        found = f"found types with lora.merge_into={lora.merge_into}, expected one of {', '.join(MIXTURES)}"
        problems.append(f"lora.merge_types: {found}. Remove one of these settings")
    if lora.merge_from and lora.merge_into is None:
        problems.append(f"lora.merge_from: found {lora.merge_from} without lora.merge_into. Set both, or neither")
    if lora.merge_into is None:
        return problems
    rounds_tables = lora.merge_into not in MERGED_FOLDERS
    against = {
        "lora.dropout": (lora.dropout, "there is one merged weight for all rows"),
        "lora.layers_to_transform": (lora.layers_to_transform, "it needs adapters in all layers of a projection"),
        "lora.target_parameters": (lora.target_parameters, "experts cannot train with merged weights yet"),
        "lora.modules_to_save": (lora.modules_to_save if rounds_tables else [], "the file rounds the tables"),
        "model.new_tokens": (model.new_tokens if rounds_tables else [], "the file rounds their rows"),
        "model.new_special_tokens": (model.new_special_tokens if rounds_tables else [], "the file rounds their rows"),
        "model.experts": (model.experts if model.experts == "offload" else None, "it needs experts on the device"),
    }
    return problems + [
        f"{name}: found {value!r} with lora.merge_into={lora.merge_into}, but {why}. Remove one of these settings"
        for name, (value, why) in against.items()
        if value
    ]


def _layer_problems(lora: LoraArgs) -> list[str]:
    if lora.layers_to_transform is None:
        return []
    try:
        parse_layers(lora.layers_to_transform)
    except ValueError as error:
        return [f"lora.layers_to_transform: {error}. Correct the numbers"]
    if isinstance(lora.target_modules, str) and lora.target_modules not in ("auto", "all-linear"):
        return [
            f"lora.layers_to_transform: found {lora.layers_to_transform!r} with a regular expression in "
            "lora.target_modules. Select the layers in the expression, or name modules in a list"
        ]
    return []


def _parameter_problems(lora: LoraArgs) -> list[str]:
    """Reports settings that adapters on parameters of experts and routers do not support."""
    if not lora.target_parameters:
        problems = [] if len(lora.target_modules) else ["lora.target_modules: found [], expected not empty"]
        if lora.share_experts:
            problems.append("lora.share_experts: found true without lora.target_parameters. Name parameters of experts")
        return problems
    wrong = {"dropout": (lora.dropout, 0.0), "init": (lora.init, "default")}
    problems = [
        f"lora.{name}: found {found!r} with lora.target_parameters, expected {expected!r}: for parameters neither PEFT "
        "nor this package supports dropout or an initialization from the weights. Remove one of the two settings"
        for name, (found, expected) in wrong.items()
        if found != expected
    ]
    if lora.target_modules == [] and lora.layers_to_transform is not None:
        problems.append(
            "lora.layers_to_transform: it applies to lora.target_modules, which is empty. Name layers in "
            "lora.target_parameters instead, such as layers.3.mlp.experts.down_proj"
        )
    return problems


def _loraplus_problems(config: Config) -> list[str]:
    ratio, method = config.optim.loraplus_lr_ratio, config.lora.method
    if ratio is None or METHODS[method].fast_leaves:
        return []
    return [
        f"optim.loraplus_lr_ratio: found {ratio} with lora.method={method}, which does not train both A and B. "
        f"Remove this setting, or set lora.method={' or '.join(methods_with('fast_leaves'))}"
    ]


def _keep_problems(config: Config) -> list[str]:
    kept, quant_type = config.model.keep_16bit, config.model.quant_type
    if kept and quant_type == "stored":
        return [
            f"model.keep_16bit: found {kept!r} with model.quant_type=stored, which keeps every layer as the files have "
            "it. Remove one of these settings"
        ]
    if not kept or quant_type != "none":
        return []
    return [
        f"model.keep_16bit: found {kept!r} with model.quant_type=none, which leaves all layers in 16 bits. Remove one "
        "of these settings"
    ]


def _offload_problems(config: Config) -> list[str]:
    if config.model.experts == "device":
        return []
    problems = []
    if config.train.remat == "none":
        problems.append(
            "train.remat: found 'none' with model.experts=offload, expected another policy, because none keeps "
            "the experts of every layer on the device. Set train.remat=names"
        )
    if config.model.keep_16bit:
        problems.append(
            f"model.keep_16bit: found {config.model.keep_16bit!r} with model.experts=offload, which needs codes in "
            "all layers of a projection. Remove one of these settings"
        )
    return problems


def _init_problems(config: Config) -> list[str]:
    init, start = config.lora.init, config.lora.start
    problems = []
    if not METHODS[config.lora.method].quantized and config.model.quant_type != "none":
        problems.append(
            f"model.quant_type: found {config.model.quant_type!r} with lora.method={config.lora.method}, expected "
            "none. Set model.quant_type=none, since 4-bit weights cannot train"
        )
    if init != "default" and start is not None:
        problems.append(
            f"lora.init: found {init!r} with lora.start={start}, expected default. Remove lora.init, since "
            "the adapter in lora.start has initial values"
        )
    if init != "default" and config.model.quant_type == "stored":
        problems.append(
            f"lora.init: found {init!r} with model.quant_type=stored, expected default. Set lora.init=default, since "
            f"{init} changes the weights, and stored codes stay as they are"
        )
    if init == "loftq" and config.model.quant_type == "nvfp4":
        problems.append(
            "lora.init: found 'loftq' with model.quant_type=nvfp4, whose error it does not correct. Set "
            "lora.init=pissa or default"
        )
    if init == "loftq" and config.model.keep_16bit:
        problems.append(
            "lora.init: found 'loftq' with model.keep_16bit, but loftq corrects the quantization error, and these "
            "layers have none. Set lora.init=pissa or default, or remove model.keep_16bit"
        )
    if init == "loftq" and config.model.quant_type == "none":
        problems.append(
            "lora.init: found 'loftq' with model.quant_type=none, but loftq corrects the quantization error. "
            "Set lora.init=pissa or default"
        )
    return problems


def _paging_problems(config: Config) -> list[str]:
    name, paging, budget = config.optim.name, config.optim.paging, config.optim.paging_budget
    if name.startswith(PAGED) and paging == "off":
        return [
            f"optim.paging: found 'off' with optim.name={name}, expected by_name, on or auto. "
            f"Use {plain_name(name)} for no paging"
        ]
    if (paging_of(config.optim) == "on") != (budget is not None):
        expected = "a size such as 2GiB" if budget is None else "null (only paging=on has a budget)"
        return [f"optim.paging_budget: found {budget!r} with optim.paging={paging}, expected {expected}"]
    try:
        if budget is not None:
            parse_bytes(budget)
    except ValueError as error:
        return [f"optim.paging_budget: {error}"]
    return []


def _token_problems(config: Config) -> list[str]:
    tokens = [*config.model.new_tokens, *config.model.new_special_tokens]
    wrong = [token for token in dict.fromkeys(tokens) if tokens.count(token) > 1 or not token.strip()]
    return [
        f"model.new_tokens, model.new_special_tokens: found {token!r}, expected unique tokens that are not blank"
        for token in wrong
    ]


def _source_problems(data: DataArgs) -> list[str]:
    weights = data.train if isinstance(data.train, dict) else {data.train: 1.0}
    problems = [
        f"data.train: found weight {weight!r} for {path!r}, expected more than 0"
        for path, weight in weights.items()
        if weight <= 0
    ]
    if isinstance(data.format, dict):
        problems += [
            f"data.format: found {path!r}, expected the files of data.train and data.eval"
            for path in data.format
            if path not in (*weights, data.eval)
        ]
    problems += _column_problems(data, [*weights, data.eval])
    if data.window is not None and data.cache is None:
        problems.append(f"data.window: found {data.window} without data.cache. Set data.cache to a folder")
    return problems


def _column_problems(data: DataArgs, files: list[str | None]) -> list[str]:
    named = [data.format] if isinstance(data.format, str) else [*data.format.values()]
    known = row_columns(tuple(named))
    by_file = {path: names for path, names in (data.columns or {}).items() if isinstance(names, dict)}
    if not by_file:
        return unknown_columns("data.columns", [*(data.columns or {})], known)
    problems = [
        f"data.columns: found {path!r}, expected the files of data.train and data.eval"
        for path in by_file
        if path not in files
    ]
    return problems + [
        problem for names in by_file.values() for problem in unknown_columns("data.columns", names, known)
    ]


def _objective_problems(config: Config) -> list[str]:
    """Reports settings of preferences, of heads, of policies and of data that the objective does not use."""
    problems = objective_problems(config.preference, config.head, config.objective) + _head_problems(config)
    problems += policy_problems(config.policy, config.rollouts, config.objective) + _rollout_problems(config)
    problems += distillation_problems(config.distillation, config.objective)
    if config.objective in ("sft", "distill"):
        return problems
    plain = DataArgs(train="")
    return problems + [
        f"data.{name}: found {value!r}, but objective={config.objective} does not use it. Remove this setting"
        for name in ("learn", "source_max_length", "target_max_length")
        if (value := getattr(config.data, name)) != getattr(plain, name)
    ]


def _rollout_problems(config: Config) -> list[str]:
    """Reports settings that contradict the sampling of replies."""
    if OBJECTIVES[config.objective].rows != "prompt":
        return []
    data, train, reply = config.data, config.train, config.rollouts.max_completion_length
    problems = []
    if data.packing:
        problems.append(
            f"data.packing: found true with objective={config.objective}, whose rows hold all replies to a prompt "
            "already. Remove this setting"
        )
    if data.max_length <= reply:
        problems.append(
            f"data.max_length: found {data.max_length}, expected more than rollouts.max_completion_length ({reply}), "
            "to leave room for prompts. Raise it"
        )
    noise = {"lora.dropout": config.lora.dropout, "train.neftune_noise_alpha": train.neftune_noise_alpha}
    problems += [
        f"{name}: found {value}, but replies are sampled without it, so their probabilities would differ from those "
        "of training. Remove this setting"
        for name, value in noise.items()
        if value
    ]
    together = config.policy.steps_per_generation * config.policy.num_iterations
    counts = {f"train.{name}": getattr(train, name) or 0 for name in ("steps", "eval_every", "save_every")}
    return problems + [
        f"{name}: found {value}, expected a multiple of {together}, the steps of a rollout phase "
        "(policy.steps_per_generation x policy.num_iterations). Change it"
        for name, value in counts.items()
        if value % together
    ]


def _head_problems(config: Config) -> list[str]:
    """Reports settings that require a language-model head, if the objective has another."""
    if not OBJECTIVES[config.objective].head:
        return []
    needing = {
        "lora.modules_to_save": "lm_head" if "lm_head" in config.lora.modules_to_save else None,
        "train.samples": config.train.samples,
        **{f"questions.{kind}": getattr(config.questions, kind) for kind in QUESTION_KINDS},
    }
    return [
        f"{name}: found {value!r} with objective={config.objective}, whose model has no language-model head. Remove it"
        for name, value in needing.items()
        if value is not None
    ]


def _relation_problems(config: Config) -> list[str]:
    problems = _pattern_problems(config) + _method_problems(config.lora) + _init_problems(config)
    problems += _layer_problems(config.lora) + _parameter_problems(config.lora) + _keep_problems(config)
    problems += _offload_problems(config) + _merge_problems(config)
    problems += _loraplus_problems(config) + _paging_problems(config)
    problems += _token_problems(config) + _objective_problems(config)
    from_rewards = OBJECTIVES[config.objective].policy
    problems += reward_problems(config.rewards, config.reward, config.objective, used=from_rewards)
    train, held_out = config.data.train, config.data.eval
    sources = [*([train] if isinstance(train, str) else train), *filter(None, [held_out])]
    given = config.tool, config.environment, config.objective
    problems += tool_problems(*given, used=from_rewards, sources=sources)
    if config.data.eval is not None and config.data.eval_fraction > 0:
        problems.append(
            f"data.eval and data.eval_fraction: found {config.data.eval!r} and {config.data.eval_fraction}, "
            "expected one of them. Remove data.eval or data.eval_fraction"
        )
    source, target = config.data.source_max_length, config.data.target_max_length
    if (source is None) != (target is None):
        problems.append(
            f"data.source_max_length and data.target_max_length: found {source} and {target}, expected both or neither"
        )
    elif source is not None and target is not None and source + target > config.data.max_length:
        problems.append(
            f"data.max_length: found {config.data.max_length}, expected at least {source + target}, "
            "the sum of data.source_max_length and data.target_max_length"
        )
    problems += _source_problems(config.data)
    problems += question_problems(config.questions, "questions.")
    return problems + _evaluation_problems(config)


def _evaluation_problems(config: Config) -> list[str]:
    """Reports settings that require evaluations, in a run without them."""
    train = config.train
    no_eval_data = config.data.eval is None and config.data.eval_fraction == 0
    requiring = {"eval_every": train.eval_every, "keep_best": train.keep_best, "patience": train.patience}
    if no_eval_data:
        return [
            f"train.{name}: found {value}, but evaluation data is missing. Set data.eval or data.eval_fraction"
            for name, value in requiring.items()
            if value and not (name == "eval_every" and (train.samples or config.questions.given))
        ]
    return [
        f"train.{name}: found {requiring[name]} with train.eval_every=0, but it requires several evaluations. "
        "Set train.eval_every"
        for name in ("keep_best", "patience")
        if requiring[name] and not train.eval_every
    ]


def validate(config: Config) -> None:
    """Raises ConfigError with all problems: types, bounds, and settings that contradict each other."""
    if problems := find_problems(type(config), dataclasses.asdict(config), {}):
        raise ConfigError(problems)
    if problems := _relation_problems(config):
        # Alone, those of a mesh wait until JAX has counted the devices.
        raise ConfigError(problems + given_mesh_problems(config))
