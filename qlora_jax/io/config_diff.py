"""In what two descriptions of a model differ."""

import dataclasses
import math
from typing import Any

import numpy as np

from qlora_jax.models.config import ModelConfig
from qlora_jax.nn.rope import SCALINGS, Rope


def differing(ours: ModelConfig, its: ModelConfig) -> list[tuple[str, str, str]]:
    """(name, ours, its) of every feature that computes something else, as far as f32 tells."""
    pairs = [(f.name, getattr(ours, f.name), getattr(its, f.name)) for f in dataclasses.fields(ModelConfig)]
    return [(name, _short(one), _short(other)) for name, one, other in pairs if not _same(one, other)]


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    text = f"{value.theta:g} {value.scaling.kind}" if isinstance(value, Rope) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _same(ours: Any, its: Any) -> bool:
    """Equal as far as f32 tells; rotations by what they do, since the same may be said in several ways."""
    if isinstance(ours, tuple) and isinstance(its, tuple):
        return len(ours) == len(its) and all(map(_same, ours, its))
    if isinstance(ours, Rope) and isinstance(its, Rope):
        return _same_rotations(ours, its)
    if isinstance(ours, float) and isinstance(its, float):
        return math.isclose(ours, its, rel_tol=1e-6)
    return ours == its


def _same_rotations(ours: Rope, its: Rope) -> bool:
    if ours.dim != its.dim:
        return False
    # Within the context that was trained and beyond it: some scalings tell the two apart.
    for length in (1, 2 * ours.max_positions):
        (frequencies, factor), (others, other) = (SCALINGS[rope.scaling.kind](rope, length) for rope in (ours, its))
        if not (np.allclose(frequencies, others, rtol=1e-5, atol=0) and math.isclose(factor, other, rel_tol=1e-6)):
            return False
    return True
