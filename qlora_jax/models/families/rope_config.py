"""Reads rotary embeddings and sliding windows from Hugging Face configs."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, TypedDict

from pydantic import FailFast, Field

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families.attributes import MAX_NUMBER, Attributes, NotNegative, Positive
from qlora_jax.nn.rope import SCALING_NUMBERS, SCALINGS, Rope, RopeScaling
from qlora_jax.untrusted_json import JsonObject, shorten, shorten_key

FULL, SLIDING = "full_attention", "sliding_attention"
LONGROPE = ("longrope", "su", "yarn")  # its name, and older names in Phi-3 configs

type Base = Annotated[float, Field(gt=1, le=MAX_NUMBER)]
type Part = Annotated[float, Field(gt=0, le=1)]  # a fraction of a head's dimensions
type Factors = Annotated[list[Positive], FailFast()]


class RopeNumbers(TypedDict, total=False):
    """The numbers of `rope_scaling`, or of `rope_parameters` in newer configs."""

    rope_type: str | None
    type: str | None
    rope_theta: Base
    partial_rotary_factor: Part
    factor: Positive | None
    original_max_position_embeddings: Base | None
    attention_factor: Positive | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    mscale: NotNegative | None
    mscale_all_dim: NotNegative | None
    truncate: bool | None
    short_factor: Factors | None
    long_factor: Factors | None


def rope_from_hf(
    attributes: Attributes,
    head_dim: int,
    max_positions: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    longrope: Mapping[str, int] | None = None,
) -> Rope:
    """Reads a Rope from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (older).

    Args:
      theta: default base of the frequencies.
      partial: default share of a head that is rotated; None: the family always rotates whole heads.
      longrope: numbers that override those of a longrope scaling.
    """
    given = attributes.number("rope_theta", theta, Base)
    new, old = (attributes.mapping(name, RopeNumbers) for name in ("rope_parameters", "rope_scaling"))
    if new and old:
        attributes.refuse("rope_parameters and rope_scaling are both given: remove one")
    numbers = dict(new or old or {})
    if longrope and _kind(numbers) in LONGROPE:
        numbers |= {"rope_type": "longrope", **longrope}
    return rope_of(attributes, numbers, head_dim, max_positions, theta=given, partial=partial)


def _kind(numbers: JsonObject) -> str:
    return numbers.get("rope_type", numbers.get("type", "default"))


def rope_of(
    attributes: Attributes,
    given: JsonObject,
    head_dim: int,
    max_positions: int,
    *,
    theta: float,
    partial: float | None = None,
) -> Rope:
    """Reads a Rope from one object of numbers; `theta` and `partial` are defaults."""
    kind = _kind(given)
    numbers = {name: value for name, value in given.items() if name not in ("rope_type", "type")}
    rope_theta = float(numbers.pop("rope_theta", theta))
    part = numbers.pop("partial_rotary_factor", 1.0 if partial is None else partial)
    if partial is None and part != 1.0:
        attributes.refuse("partial_rotary_factor other than 1 is not supported")
    whole = {"theta": rope_theta, "dim": int(head_dim * part), "max_positions": max_positions}
    if kind not in SCALINGS:
        attributes.refuse(f"rope scaling {shorten(kind)} is not supported: known are {sorted(SCALINGS)}")
        return Rope(**whole)
    numbers = {name: value for name, value in numbers.items() if value is not None}
    required, optional = SCALING_NUMBERS[kind]
    if missing := required - numbers.keys():
        attributes.refuse(f"rope scaling {kind!r} lacks {sorted(missing)}")
    if unknown := numbers.keys() - required - optional:
        attributes.refuse(f"rope scaling {kind!r} has unknown {sorted(map(shorten_key, unknown))}")
        return Rope(**whole)
    _check_numbers(attributes, {"original_max_position_embeddings": max_positions, **numbers}, whole["dim"] // 2)
    scaling = RopeScaling(kind=kind, numbers=tuple((name, _as_float(v)) for name, v in sorted(numbers.items())))
    return Rope(**whole, scaling=scaling)


def _check_numbers(attributes: Attributes, numbers: JsonObject, frequencies: int) -> None:
    """Checks the numbers of a scaling against each other and against the head."""
    for name, value in numbers.items():
        if isinstance(value, list) and len(value) != frequencies:
            attributes.refuse(
                f"{name}: found {len(value)} numbers, expected {frequencies}, half the rotated dimensions"
            )
    if "long_factor" in numbers and numbers["original_max_position_embeddings"] == 1:
        attributes.refuse("original_max_position_embeddings: found 1, expected more than 1")
    low, high = numbers.get("low_freq_factor"), numbers.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        attributes.refuse(f"low_freq_factor: found {low}, expected less than high_freq_factor, {high}")


def _as_float(value: float | list[float] | None) -> float | tuple[float, ...] | None:
    """Converts whole numbers to floats, and lists to tuples of floats."""
    if isinstance(value, list):
        return tuple(float(v) for v in value)
    return float(value) if type(value) is int else value


def layer_types(attributes: Attributes, default: list[str]) -> list[str]:
    """Reads the kind of attention per layer: FULL or SLIDING."""
    return attributes.by_layer("layer_types", len(default), default, (FULL, SLIDING))


def windows_of(attributes: Attributes, types: list[str], window: int | None) -> tuple[int | None, ...]:
    """Returns ModelConfig.windows: `window` in the layers of kind SLIDING; empty if there are none."""
    if SLIDING not in types:
        return ()
    if window is None:
        attributes.refuse(f"layer_types has {SLIDING!r}, and sliding_window is not given")
    return tuple(window if kind == SLIDING else None for kind in types)


def periodic_windows(attributes: Attributes, period: int) -> tuple[int | None, ...]:
    """Returns ModelConfig.windows; without `layer_types`, all layers but every `period`-th have a window."""
    layers, window = attributes.integer("num_hidden_layers"), attributes.window("sliding_window", 4096)
    types = layer_types(attributes, [SLIDING if (layer + 1) % period else FULL for layer in range(layers)])
    return windows_of(attributes, types, window)


RopeOf = Callable[[int, int], Rope]  # (head_dim, max_positions) -> Rope


def ropes_by_window(attributes: Attributes, *, theta: float, local_theta: float) -> tuple[RopeOf, RopeOf]:
    """Returns the ropes of layers without and with a window.

    A config has them per kind of layer (transformers 5), or has one base and scaling of layers without a window.

    Args:
      theta, local_theta: bases of the two kinds of layers where the config has none.
    """
    given = attributes.mapping("rope_parameters", dict[str, RopeNumbers | None])
    if given is None:
        whole = functools.partial(rope_from_hf, attributes, theta=theta)
        return whole, functools.partial(rope_of, attributes, {}, theta=local_theta)
    attributes.require_only({"rope_scaling": None})
    if unknown := given.keys() - {FULL, SLIDING}:
        attributes.refuse(f"rope_parameters: found {shorten(sorted(unknown))}, expected {FULL!r} and {SLIDING!r}")
    numbers = [given.get(kind) or {} for kind in (FULL, SLIDING)]
    thetas = (attributes.number("rope_theta", theta, Base), local_theta)
    whole, local = (functools.partial(rope_of, attributes, n, theta=t) for n, t in zip(numbers, thetas, strict=True))
    return whole, local


def ropes_of_windows(model: ModelConfig, local: RopeOf) -> tuple[Rope, ...]:
    """Returns ModelConfig.ropes: `local` in layers with a window, and the model's rope in others."""
    turned_locally = local(model.head_dim, model.max_positions)
    return tuple(model.rope if window is None else turned_locally for window in model.windows)
