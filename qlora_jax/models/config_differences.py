"""Lists the features in which two model descriptions differ."""

import dataclasses
import math

import numpy as np

from qlora_jax.models.config import ModelConfig
from qlora_jax.nn.rope import SCALINGS, QueryPositionScale, Rope


def config_differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, str, str]]:
    """(name, ours, theirs) of every feature that computes something else, at f32 precision."""
    pairs = [(f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ModelConfig)]
    return [(name, _short(one), _short(other)) for name, one, other in pairs if not _equal(one, other)]


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    text = f"{value.theta:g} {value.scaling.kind}" if isinstance(value, Rope) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _equal(ours: object, theirs: object) -> bool:
    """True if two values are equal at f32 precision; rotations are compared by the angles that they compute."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if isinstance(ours, Rope) and isinstance(theirs, Rope):
        return _equal_rotations(ours, theirs)
    if isinstance(ours, QueryPositionScale) and isinstance(theirs, QueryPositionScale):
        return _equal(dataclasses.astuple(ours), dataclasses.astuple(theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _equal_rotations(ours: Rope, theirs: Rope) -> bool:
    if ours.dim != theirs.dim:
        return False
    # Some scalings change their angles beyond the trained context, so both sides of it are compared.
    for length in (1, 2 * ours.max_positions):
        (frequencies, factor), (others, other) = (SCALINGS[rope.scaling.kind](rope, length) for rope in (ours, theirs))
        if not (np.allclose(frequencies, others, rtol=1e-5, atol=0) and math.isclose(factor, other, rel_tol=1e-6)):
            return False
    return True
