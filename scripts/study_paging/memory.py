"""Computes the memory of LLaMA's training steps on absent cards, by length, from compiled programs.

A point is one compiled step: its scratch, as assigned by XLA for that card. Everything else follows from shapes
(qlora_jax/training/cost/memory_use.py). Between and beyond points, scratch is interpolated linearly.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

from pallas_kernels import aot
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.catalog import PUBLISHED
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.memory_use import activation_bytes, offloaded_activation_bytes
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.plan.step_memory import PAGES_IN_FLIGHT
from qlora_jax.training.step_spec import StepSpec

RANK = 64
LENGTHS = {"full": (512, 2048, 8192), "offload": (2048, 8192)}
CELLS = {
    "rtx4090": ("llama-7b", "llama-13b", "llama-33b"),
    "a6000": ("llama-7b", "llama-13b", "llama-33b", "llama-65b"),
    "a100": ("llama-7b", "llama-13b", "llama-33b", "llama-65b"),
}
BYTES_8BIT = 2.03125 / 8  # relative to f32 moments: two codes, and two f32 scales per 256 elements


class Point(NamedTuple):
    """Scratch bytes of one compiled step of 1 x `length` tokens."""

    model: str
    card: str
    remat: str
    length: int
    scratch: int


@functools.cache
def setting(model: str, batch: tuple[int, int, int], remat: str) -> StepSpec:
    """Returns the setting: rank 64 on all linear layers, f32 adapters, NF4 and double quantization."""
    return StepSpec(
        model=model_config(PUBLISHED[model]),
        weights=WeightFormat(platform="gpu"),
        lora=LoraArgs(rank=RANK),
        optim=OptimArgs(),
        batch=batch,
        remat=remat,
    )


def missing(points: Sequence[Point]) -> Iterator[tuple[str, str, str, int]]:
    """Yields the points of the study that are not in `points`."""
    have = {point[:4] for point in points}
    for card, models in CELLS.items():
        for model in models:
            wanted = [(model, card, remat, length) for remat, lengths in LENGTHS.items() for length in lengths]
            yield from (each for each in wanted if each not in have)


def compile_point(model: str, card: str, remat: str, length: int) -> Point:
    """Compiles one point, in about 15 s."""
    asked = setting(model, (1, 1, length), remat)
    program, of = asked.gradients(), asked.sizes
    memory = aot.compile_for(card, program.function, *program.args, **program.kwargs).memory
    assert memory.host.temporaries >= sum(offloaded_activation_bytes(of).values())
    saved = sum(activation_bytes(of).values())
    per_batch = max(memory.device.temporaries + memory_use.batch_bytes(of), update_temporaries(model, card))
    return Point(model, card, remat, length, per_batch - saved)


@functools.cache
def update_temporaries(model: str, card: str) -> int:
    """Returns the temporary bytes of the update's program, which do not depend on the batch."""
    program = setting(model, (1, 1, 64), "full").update()
    return aot.compile_for(card, program.function, *program.args, **program.kwargs).memory.device.temporaries


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a model's steps on a card: `fixed`, optimizer `state`, and `per_batch(M)` for M tokens at once."""

    step: StepSpec
    points: list[Point]

    @classmethod
    def of(cls, points: Sequence[Point], model: str, card: str, remat: str) -> "StepMemory":
        """Selects the points of one model, card and remat policy."""
        found = [point for point in points if (point.model, point.card, point.remat) == (model, card, remat)]
        return cls(setting(model, (1, 1, 64), remat), sorted(found, key=lambda point: point.length))

    def _counted(self, rows: int) -> StepShape:
        return self.step.resized(1, rows).sizes

    @property
    def lora(self) -> int:
        """Returns the bytes of the adapters."""
        return memory_use.lora_bytes(self._counted(1))

    @property
    def state(self) -> int:
        """Returns the bytes of Adam's moments in f32."""
        return memory_use.optimizer_bytes(self._counted(1))

    @property
    def fixed(self) -> int:
        """Returns the bytes of weights, constants, adapters and their gradients."""
        return sum(memory_use.frozen_bytes(self._counted(1)).values()) + 2 * self.lora

    def scratch(self, rows: int) -> float:
        """Returns scratch bytes, on the line through the two points around `rows` tokens, or the nearest two."""
        pairs = list(itertools.pairwise(self.points))
        left, right = next((pair for pair in pairs if rows <= pair[1].length), pairs[-1])
        slope = (right.scratch - left.scratch) / (right.length - left.length)
        return max(0.0, left.scratch + slope * (rows - left.length))

    def per_batch(self, rows: int) -> float:
        """Returns the bytes of saved activations and scratch for `rows` tokens."""
        return sum(activation_bytes(self._counted(rows)).values()) + self.scratch(rows)

    def longest(self, limit: float, state_on_device: float) -> int:
        """Returns the longest row, a multiple of 64 tokens, that fits next to the optimizer state; 0 if none does."""
        fits = [n for n in range(64, 65_536 + 1, 64) if self.fixed + state_on_device + self.per_batch(n) <= limit]
        return max(fits, default=0)


class LongestRow(TypedDict):
    """The longest row of a model on a card, by kind of optimizer state."""

    model: str
    card: str
    longest: dict[str, int]


def state_choices(memory: StepMemory) -> dict[str, float]:
    """Returns the bytes of optimizer state on the device, by kind of state."""
    return {
        "f32, on the device": memory.state,
        "8-bit, on the device": memory.state * BYTES_8BIT,
        "f32, paged": min(memory.state, PAGES_IN_FLIGHT),
    }


def longest_rows(points: Sequence[Point], limits: dict[str, float]) -> list[LongestRow]:
    """Returns the longest row per model and card, by kind of state, and with offloaded activations."""
    rows = []
    for card, models in CELLS.items():
        for model in models:
            full, offload = (StepMemory.of(points, model, card, remat) for remat in ("full", "offload"))
            found = {name: full.longest(limits[card], size) for name, size in state_choices(full).items()}
            found["f32, paged, activations offloaded"] = offload.longest(
                limits[card], min(offload.state, PAGES_IN_FLIGHT)
            )
            rows.append({"model": model, "card": card, "longest": found})
    return rows
