"""The method `lora`, and what it shares with others: ranks, scalings, the values at the start, and PEFT's form."""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import METHODS
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work
from qlora_jax.methods.expert_lora import add_expert_adapters
from qlora_jax.methods.low_rank_cost import low_rank_work, ranked_parameters, ranked_projections, saved_products
from qlora_jax.methods.method import Given, Method, linears, our_names
from qlora_jax.methods.peft_experts import (
    entries_of,
    expert_parameters,
    expert_tensors,
    own_patterns,
    read_parameters,
    target_entries,
)
from qlora_jax.methods.peft_form import (
    PeftFile,
    PeftForm,
    PeftKeys,
    PeftLeaf,
    ReadAdapter,
    TrainedAdapter,
    common_config,
    layer_tensors,
    setting_differences,
    stack_layers,
)
from qlora_jax.methods.peft_names import (
    EVERY_LAYER,
    SomeLayers,
    linears_of,
    target_settings,
    target_suffixes,
    targeted_layers,
)
from qlora_jax.methods.targets import Layers, ranks_and_scalings, target_layers
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import AdapterArrays
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.nn.linear import LinearAdapter, QLinear
from qlora_jax.nn.lora import LoRA, initial_factors
from qlora_jax.nn.random_keys import named_key
from qlora_jax.regex import file_pattern_problems, matches_end
from qlora_jax.sharding import init_sharded
from qlora_jax.untrusted_json import JsonObject, shorten

MATRICES = ("lora_a", "lora_b")
MAX_PATTERNS = 10_000  # each is compiled
# Initial values that leave the base unchanged; others (PiSSA, OLoRA, LoftQ, CorDA) move a part of it to the adapter.
INITS = (True, False, "gaussian", "orthogonal", "eva")

type Rank = Annotated[int, Field(ge=1, le=1 << 16)]
type Alpha = Annotated[float, Field(allow_inf_nan=False)]


class LowRankKeys(PeftKeys, total=False):
    """The settings of PEFT's LoraConfig."""

    layers_to_transform: int | list[int] | None
    target_parameters: Annotated[list[str], Field(max_length=MAX_PATTERNS)] | None
    r: Annotated[int, Field(ge=0, le=1 << 16)]
    lora_alpha: Alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    use_rslora: bool | None
    use_dora: bool | None
    rank_pattern: Annotated[dict[str, Rank], Field(max_length=MAX_PATTERNS)] | None
    alpha_pattern: Annotated[dict[str, Alpha], Field(max_length=MAX_PATTERNS)] | None
    init_lora_weights: bool | str | None


class LowRankForm(PeftForm):
    """PEFT's LORA: lora_A.weight [R, K] and lora_B.weight [N, R], and lora_magnitude_vector [N] with DoRA."""

    keys = LowRankKeys
    required = ("r", "lora_alpha")
    unused = ("loftq_config", "megatron_config", "megatron_core", "qalora_group_size", "eva_config", "corda_config")
    leaves: ClassVar[Mapping[str, PeftLeaf]] = {
        "lora_a": PeftLeaf("lora_A.weight", np.transpose),
        "lora_b": PeftLeaf("lora_B.weight", np.transpose),
        "magnitude": PeftLeaf("lora_magnitude_vector"),
    }

    def describe(self, config: JsonObject) -> str:
        """Returns what an adapter is, with its rank and alpha."""
        return "A {} adapter (rank {r}, alpha {lora_alpha})".format("DoRA" if config["use_dora"] else "LoRA", **config)

    def config(self, adapter: TrainedAdapter, base: str) -> JsonObject:
        """Returns adapter_config.json. rsLoRA's scaling is written as an alpha, because not every reader supports it.

        Raises:
          ValueError: a module's rank differs from its settings, or PEFT has no DoRA for a module of experts.
        """
        lora, args, some_layers = adapter.lora, adapter.args, adapter.some_layers
        parameters, use_dora = target_entries(adapter), args.method == "dora"
        if parameters and use_dora:
            raise ValueError(
                "--format peft: PEFT has no DoRA for these modules of a mixture of experts: "
                f"{', '.join(sorted(parameters))}. Export one model instead: --format hf or gguf"
            )
        wrong = []
        for name, matrices in lora.items():
            expected = _first_match(args.rank_pattern, name, args.rank, some_layers)
            found = matrices["lora_a"].shape[-1]
            if found != expected:
                wrong.append(f"{name} has rank {found}, expected {expected}")
        if wrong:
            raise ValueError(f"the LoRA's ranks differ from the run's settings: {'; '.join(wrong)}")
        common = common_config(adapter, base, [name for name in lora if name not in parameters])
        if parameters:
            common["target_parameters"] = sorted(entry for entries in parameters.values() for entry in entries)
        alpha, alpha_pattern = _alphas(adapter)
        ranks = {name: matrices["lora_a"].shape[-1] for name, matrices in lora.items()}
        alphas = effective_alphas(lora, args, some_layers)
        # PEFT matches patterns with the names of parameters, which ours need not end like.
        exactly = [(re.escape(entry), name) for name, entries in parameters.items() for entry in entries]
        alpha_pattern |= {entry: alphas[name] for entry, name in exactly if alphas[name] != alpha}
        own_ranks = {entry: ranks[name] for entry, name in exactly if ranks[name] != args.rank}
        return common | {
            "peft_type": "LORA",
            "r": args.rank,
            "lora_alpha": _integer_if_whole(alpha),
            # PEFT has no dropout on parameters, and refuses it for all modules then; it does not act in inference.
            "lora_dropout": 0.0 if parameters else args.dropout,
            "use_rslora": False,
            "use_dora": use_dora,
            "rank_pattern": dict(args.rank_pattern) | own_ranks,
            "alpha_pattern": {pattern: _integer_if_whole(value) for pattern, value in alpha_pattern.items()},
            "bias": "none",
            "init_lora_weights": True,
        }

    def tensors(self, adapter: TrainedAdapter) -> dict[str, np.ndarray]:
        """Returns the tensors of projections, routers and experts."""
        of_experts = expert_parameters(adapter.model)
        experts = {name: leaves for name, leaves in adapter.lora.items() if name in of_experts}
        others = {name: leaves for name, leaves in adapter.lora.items() if name not in experts}
        tensors = layer_tensors(others, self.leaves, adapter.some_layers)
        return tensors | expert_tensors(experts, adapter.layers_of, adapter.model)

    def settings(self, config: LowRankKeys, model: ModelConfig) -> set[str]:
        """Returns the settings that it can read: DoRA is on all layers, and parameters are those of experts."""
        unread = {"layers_to_transform", "target_parameters"} if config.get("use_dora") else set()
        return super().settings(config, model) - unread - (set() if model.experts else {"target_parameters"})

    def problems(self, config: LowRankKeys) -> list[str]:
        """Lists a rank of 0, initial values that change the base, and patterns that cannot be matched."""
        problems = ["r: found 0, expected at least 1"] if config.get("r") == 0 else []
        init = config.get("init_lora_weights", True)
        if init not in INITS:
            problems.append(
                f"init_lora_weights: {shorten(init)} changes the base. Convert the adapter to a plain LoRA with peft "
                "(save_pretrained with path_initial_model_for_weight_conversion)"
            )
        patterns = {name: config.get(name) or () for name in ("rank_pattern", "alpha_pattern")}
        return problems + file_pattern_problems(patterns)

    def read(self, file: PeftFile[LowRankKeys]) -> ReadAdapter:
        """Reads the adapters of projections, routers and experts."""
        if file.config.get("use_dora"):
            lora, some_layers = stack_layers(file, self), {}
        else:
            parameters = read_parameters(file.config.get("target_parameters") or (), file.tensors, file.model)
            some_layers = targeted_layers(file.config, file.model) | parameters.layers
            problems = file.problems + parameters.problems
            rest = dataclasses.replace(file, tensors=parameters.rest, problems=problems)
            lora = stack_layers(rest, self, MATRICES, some_layers, given=bool(parameters.lora)) | parameters.lora
        return ReadAdapter(lora, _args(file.config, lora, some_layers, file.model))

    def shapes(self, first: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of a layer's tensors, whose rank is that of the first layer."""
        (n, k), rank = shape, first["lora_a"][0]
        return {"lora_a": (rank, k), "lora_b": (n, rank), "magnitude": (n,)}

    def differences(self, ours: LoraArgs, of_adapter: LoraArgs, model: ModelConfig) -> list[str]:
        """Lists differences of ranks and scalings, and projections whose adapters are on other layers."""
        names = ("rank", "alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        wrong = setting_differences(names, ours, of_adapter)
        if METHODS[ours.method].some_layers:
            here, there = (target_layers(model, each) for each in (ours, of_adapter))
            wrong += [
                f"layers of {name}: found {list(layers)}, expected {list(there[name])}"
                for name, layers in here.items()
                if layers != there.get(name, layers)
            ]
        return wrong


def _args(config: LowRankKeys, lora: AdapterArrays, some_layers: SomeLayers, model: ModelConfig) -> LoraArgs:
    layers_of = {model.hugging_face_name(name): layers for name, layers in some_layers.items()}
    names = [model.hugging_face_name(name) for name in lora]
    modules = [name for name in names if name in linears_of(model)]
    assert "r" in config and "lora_alpha" in config  # required
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


def _alphas(adapter: TrainedAdapter) -> tuple[float, dict[str, float]]:
    """(alpha, alpha by pattern) to divide by the rank: rsLoRA's alpha / sqrt(rank) is alpha sqrt(rank) / rank."""
    args, linears = adapter.args, linears_of(adapter.model)
    if not args.use_rslora:
        return args.alpha, dict(args.alpha_pattern)
    whole, each = args.alpha * math.sqrt(args.rank), effective_alphas(adapter.lora, args, adapter.some_layers)
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


def _integer_if_whole(number: float) -> float | int:
    """Returns 32 for 32.0, because PEFT writes alpha as an integer."""
    return int(number) if float(number).is_integer() else number


class LowRankStart(NamedTuple):
    """A targeted projection, and what its low-rank adapter starts with; `layers` None: all of them."""

    linear: QLinear
    lora_a: jax.Array
    lora_b: jax.Array
    scaling: float
    layers: Layers | None


class LowRankMethod(Method):
    """A method that adds scaling * A B to projections."""

    peft = LowRankForm()
    merged_products: ClassVar[int | None] = 2
    trains_a: ClassVar[bool] = True

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns the targeted projections; raises ValueError as `ranks_and_scalings`."""
        return ranks_and_scalings(config, spec)

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds an adapter to each targeted projection."""
        for start in [*_starts(model, spec, given)]:
            start.linear.adapter = self.adapter(start, spec, given)

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns the layers with adapters, whose inputs the gradient of A reads."""
        ranked = ranked_projections(config, spec) | ranked_parameters(config, spec)
        layers = {name: one.layers for name, one in ranked.items()}
        return AdapterShape(layers=layers, reads=layers if self.trains_a else {})

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        """Returns the work of x A B."""
        on = ranked_projections(sizes.model, sizes.lora), ranked_parameters(sizes.model, sizes.lora)
        return (low_rank_work(sizes, *on, trains_a=self.trains_a),)

    def saved(self, sizes: StepSizes) -> dict[str, int]:
        """Returns the bytes of x A."""
        on = ranked_projections(sizes.model, sizes.lora), ranked_parameters(sizes.model, sizes.lora)
        return saved_products(sizes, *on)

    def adapter(self, start: LowRankStart, spec: LoraArgs, given: Given) -> LinearAdapter:
        """Returns the adapter of one projection."""
        return LoRA(start.lora_a, start.lora_b, start.scaling, spec.dropout, start.layers)


def _starts(model: CausalLM, spec: LoraArgs, given: Given) -> Iterator[LowRankStart]:
    known, ours, num_layers = dict(linears(model)), our_names(model.config), model.config.num_layers
    layers_of = target_layers(model.config, spec)
    for name, (rank, scaling) in ranks_and_scalings(model.config, spec).items():
        linear, layers = known[name], layers_of[name]
        if given.initial is None:
            draw = functools.partial(
                initial_factors, stack=num_layers, shape=linear.shape, rank=rank, dtype=spec.dtype, layers=layers
            )
            a, b = init_sharded(draw, named_key(given.key, name), given.mesh)
        else:
            a, b = (jnp.asarray(given.initial[ours[name]][leaf], spec.dtype) for leaf in ("lora_a", "lora_b"))
        yield LowRankStart(linear, a, b, scaling, None if len(layers) == num_layers else layers)


class LoRAMethod(LowRankMethod):
    """LoRA on projections, and on parameters of experts and routers."""

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds an adapter to each targeted projection and parameter."""
        super().attach(model, spec, given)
        add_expert_adapters(model, spec, given.key, given.mesh)


METHOD = LoRAMethod()
