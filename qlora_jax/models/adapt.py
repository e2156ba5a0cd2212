"""Which projections get an adapter, and putting it there."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax

from qlora_jax.config import LoraArgs
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.linear import QLinear, named_key
from qlora_jax.nn.lora import LoRA

ALL_LINEAR = "all-linear"


def linears(model: CausalLM) -> Iterator[tuple[str, QLinear]]:
    """(name with the layer's index left out, projection) of each adaptable projection."""
    for name in model.config.linear_shapes():
        group, projection = name.split(".")
        linear: QLinear = getattr(getattr(model.model.layers, group), projection)
        yield linear.name, linear


def add_lora(model: CausalLM, spec: LoraArgs, key: jax.Array) -> None:
    """Sets a LoRA adapter on each projection that the spec targets; its delta is zero until it is trained.

    Each adapter's initial values belong to (key, name): they do not depend on what else is targeted.

    Raises:
      ValueError: a pattern that matches nothing, or that singles out some layers of a stack; rank below 1.
    """
    layers = model.config.num_layers
    known = dict(linears(model))
    targets = _targets(spec.target_modules, list(known), layers)
    ranks = _by_pattern("rank_pattern", spec.rank_pattern, spec.rank, targets, layers)
    alphas = _by_pattern("alpha_pattern", spec.alpha_pattern, spec.alpha, targets, layers)
    for name in targets:
        rank, alpha = ranks[name], alphas[name]
        if rank < 1:
            raise ValueError(f"rank {rank} for {name}: a rank of at least 1 is needed")
        known[name].adapter = LoRA.init(
            named_key(key, name),
            layers,
            known[name].shape,
            rank=rank,
            scaling=alpha / math.sqrt(rank) if spec.use_rslora else alpha / rank,
            dropout=spec.dropout,
            dtype=spec.dtype,
        )


def _full_names(name: str, layers: int) -> list[str]:
    """The Hugging Face names of one stacked projection."""
    return [name.replace(".layers.", f".layers.{i}.", 1) for i in range(layers)]


def _is_whole(pattern: str, full_name: str) -> bool:
    return re.fullmatch(pattern, full_name) is not None


def _is_suffix(pattern: str, full_name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", full_name) is not None


def _stacks_matched(what: str, pattern: str, matches, names: Sequence[str], layers: int) -> list[str]:
    """The stacked names of which `matches` takes every layer; refuses none at all, and some layers only."""
    matched = {name: sum(matches(pattern, full) for full in _full_names(name, layers)) for name in names}
    partial = [f"{name} ({count} of {layers} layers)" for name, count in matched.items() if 0 < count < layers]
    if partial:
        raise ValueError(
            f"{what} {pattern!r} singles out layers of {', '.join(partial)}: layers are stacked, so all layers of a "
            "projection are adapted alike; name the projection without a layer's index"
        )
    if not any(matched.values()):
        raise ValueError(f"{what} {pattern!r} matches none of the linear layers: {', '.join(names)}")
    return [name for name, count in matched.items() if count]


def _targets(target_modules: str | Sequence[str], names: list[str], layers: int) -> list[str]:
    if target_modules == ALL_LINEAR:
        return names
    if isinstance(target_modules, str):
        return _stacks_matched("target_modules", target_modules, _is_whole, names, layers)
    if not target_modules:
        raise ValueError(f"target_modules is an empty list: name layers, or {ALL_LINEAR!r}")
    found = [
        name
        for entry in target_modules
        for name in _stacks_matched("target_modules", re.escape(entry), _is_suffix, names, layers)
    ]
    return [name for name in names if name in found]


def _by_pattern(what: str, patterns: Mapping, default, targets: Sequence[str], layers: int) -> dict:
    """Each target's value: that of the first pattern that matches it, or the default."""
    values = {}
    for pattern, value in patterns.items():
        for name in _stacks_matched(what, pattern, _is_suffix, targets, layers):
            values.setdefault(name, value)
    return {name: values.get(name, default) for name in targets}
