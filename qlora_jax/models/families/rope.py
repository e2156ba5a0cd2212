"""Rotary embeddings and sliding windows, as Hugging Face configs say them."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.families.attributes import Attributes
from qlora_jax.nn.rope import SCALING_NUMBERS, SCALINGS, Rope, RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"
LONGROPE = ("longrope", "su", "yarn")  # its name, and what Phi-3's configs called it before


def rope_from_hf(
    attributes: Attributes,
    head_dim: int,
    max_positions: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    longrope: Mapping[str, int] | None = None,
) -> Rope:
    """Rope from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (before).

    Args:
      theta: where the config gives none.
      partial: which part of a head is turned where the config says nothing; None: the family always turns all of it.
      longrope: what stands beside the numbers rather than among them, where that is the scaling.
    """
    given = attributes.number("rope_theta", theta)
    new, old = attributes.mapping("rope_parameters"), attributes.mapping("rope_scaling")
    if new and old:
        attributes.refuse("rope_parameters and rope_scaling are both given: remove one")
    numbers = dict(new or old or {})
    if longrope and _kind(numbers) in LONGROPE:
        numbers |= {"rope_type": "longrope", **longrope}
    return rope_of(attributes, numbers, head_dim, max_positions, theta=given, partial=partial)


def _kind(numbers: Mapping[str, Any]) -> str:
    return numbers.get("rope_type", numbers.get("type", "default"))


def rope_of(
    attributes: Attributes,
    given: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    *,
    theta: float,
    partial: float | None = None,
) -> Rope:
    """Rope from one object of numbers; theta and partial hold where it does not give them."""
    kind = _kind(given)
    numbers = {name: value for name, value in given.items() if name not in ("rope_type", "type")}
    rope_theta = float(numbers.pop("rope_theta", theta))
    part = numbers.pop("partial_rotary_factor", 1.0 if partial is None else partial)
    if partial is None and part != 1.0:
        attributes.refuse("partial_rotary_factor other than 1 is not supported")
    whole = {"theta": rope_theta, "dim": int(head_dim * part), "max_positions": max_positions}
    if kind not in SCALINGS:
        attributes.refuse(f"rope scaling {kind!r} is not supported: known are {sorted(SCALINGS)}")
        return Rope(**whole)
    required, optional = SCALING_NUMBERS[kind]
    if missing := required - numbers.keys():
        attributes.refuse(f"rope scaling {kind!r} lacks {sorted(missing)}")
    if unknown := {n for n in numbers.keys() - required - optional if numbers[n] is not None}:
        attributes.refuse(f"rope scaling {kind!r} has {sorted(unknown)}, which it does not know")
    scaling = RopeScaling(kind=kind, numbers=tuple((name, _as_float(v)) for name, v in sorted(numbers.items())))
    return Rope(**whole, scaling=scaling)


def _as_float(value: Any) -> Any:
    """JSON's whole numbers as floats, lists as tuples."""
    if isinstance(value, list):
        return tuple(float(v) for v in value)
    return float(value) if type(value) is int else value


def layer_types(attributes: Attributes, default: list[str]) -> list[str]:
    """Of each layer, whether its attention has the window."""
    return attributes.by_layer("layer_types", len(default), default, (FULL, SLIDING))


def windows_of(attributes: Attributes, types: list[str], window: int | None) -> tuple[int | None, ...]:
    """ModelConfig.windows: of `window` positions in the layers that slide; empty where none does."""
    if SLIDING not in types:
        return ()
    if window is None:
        attributes.refuse(f"layer_types has {SLIDING!r}, and sliding_window is not given")
    return tuple(window if kind == SLIDING else None for kind in types)
