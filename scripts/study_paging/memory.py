"""What steps of LLaMA need on cards that are absent, by length: the part of the study that is compiled.

A point is one compiled step: its scratch, as XLA assigns it for that card. All else that a step holds
follows from shapes (qlora_jax/training/cost/memory_use.py). Between points, and beyond them, scratch lies on the line
through two neighbours.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pallas_kernels import aot
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.catalog import PUBLIC
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.training.cost import flops, memory_use
from qlora_jax.training.cost.activations import offloaded_bytes, saved_bytes
from qlora_jax.training.plan.requirements import PAGES_IN_FLIGHT, Setting

RANK = 64
LENGTHS = {"full": (512, 2048, 8192), "offload": (2048, 8192)}
CELLS = {
    "rtx4090": ("llama-7b", "llama-13b", "llama-33b"),
    "a6000": ("llama-7b", "llama-13b", "llama-33b", "llama-65b"),
    "a100": ("llama-7b", "llama-13b", "llama-33b", "llama-65b"),
}
BYTES_8BIT = 2.03125 / 8  # of f32 moments: two codes, and two f32 scales for 256 elements


class Point(NamedTuple):
    """Scratch of one compiled step of 1 x `length` tokens, bytes."""

    model: str
    card: str
    remat: str
    length: int
    scratch: int


@functools.cache
def setting(model: str, batch: tuple[int, int, int], remat: str) -> Setting:
    """Rank 64 on all linear layers, f32 adapters, NF4 and double quantization."""
    return Setting(
        model=model_config(PUBLIC[model]),
        weights=WeightFormat(platform="gpu"),
        lora=LoraArgs(rank=RANK),
        optim=OptimArgs(),
        batch=batch,
        remat=remat,
    )


def missing(points: Sequence[Point]) -> Iterator[tuple[str, str, str, int]]:
    """What the study wants and does not have yet."""
    have = {point[:4] for point in points}
    for card, models in CELLS.items():
        for model, (remat, lengths) in itertools.product(models, LENGTHS.items()):
            wanted = ((model, card, remat, length) for length in lengths)
            yield from (each for each in wanted if each not in have)


def compile_point(model: str, card: str, remat: str, length: int) -> Point:
    """One compilation, some 15 s."""
    asked = setting(model, (1, 1, length), remat)
    program, of = asked.step.gradients(), asked.counted()
    memory = aot.compile_for(card, program.function, *program.args, **program.kwargs).memory
    assert memory.host.temporaries >= sum(offloaded_bytes(of).values())
    kept = sum(saved_bytes(of).values())
    moving = max(memory.device.temporaries + memory_use.batch_bytes(of), update_temporaries(model, card))
    return Point(model, card, remat, length, moving - kept)


@functools.cache
def update_temporaries(model: str, card: str) -> int:
    """Of the update's program, whatever the batch."""
    program = setting(model, (1, 1, 64), "full").step.update()
    return aot.compile_for(card, program.function, *program.args, **program.kwargs).memory.device.temporaries


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of a model's steps on a card: `held`, `state` and `on_device(M)` of M tokens at once."""

    step: Setting
    points: list[Point]

    @classmethod
    def of(cls, points: Sequence[Point], model: str, card: str, remat: str) -> "Needs":
        found = [point for point in points if (point.model, point.card, point.remat) == (model, card, remat)]
        return cls(setting(model, (1, 1, 64), remat), sorted(found, key=lambda point: point.length))

    def _counted(self, rows: int) -> flops.Step:
        return self.step.resized(1, rows).counted()

    @property
    def lora(self) -> int:
        return memory_use.lora_bytes(self._counted(1))

    @property
    def state(self) -> int:
        """Adam's moments in f32."""
        return memory_use.optimizer_bytes(self._counted(1))

    @property
    def held(self) -> int:
        """Weights, constants, adapters and their gradients."""
        return sum(memory_use.frozen_bytes(self._counted(1)).values()) + 2 * self.lora

    def scratch(self, rows: int) -> float:
        """On the line through the two points around `rows`, or the nearest two."""
        pairs = list(itertools.pairwise(self.points))
        left, right = next((pair for pair in pairs if rows <= pair[1].length), pairs[-1])
        slope = (right.scratch - left.scratch) / (right.length - left.length)
        return max(0.0, left.scratch + slope * (rows - left.length))

    def moving(self, rows: int) -> float:
        """What is kept between forward and backward, and scratch."""
        return sum(saved_bytes(self._counted(rows)).values()) + self.scratch(rows)

    def longest(self, limit: float, state_on_device: float) -> int:
        """The longest row, a multiple of 64, that fits beside so much optimizer state; 0: none."""
        fits = [n for n in range(64, 65_536 + 1, 64) if self.held + state_on_device + self.moving(n) <= limit]
        return max(fits, default=0)


def state_choices(needs: Needs) -> dict[str, float]:
    """Optimizer state on the device, in bytes, by how it is held."""
    return {
        "f32, on the device": needs.state,
        "8-bit, on the device": needs.state * BYTES_8BIT,
        "f32, paged": min(needs.state, PAGES_IN_FLIGHT),
    }


def longest_rows(points: Sequence[Point], limits: dict[str, float]) -> list[dict[str, Any]]:
    """For each model and card: the longest row by how state is held, and with activations offloaded too."""
    rows = []
    for card, models in CELLS.items():
        for model in models:
            full, away = (Needs.of(points, model, card, remat) for remat in ("full", "offload"))
            found = {name: full.longest(limits[card], size) for name, size in state_choices(full).items()}
            found["f32, paged, activations offloaded"] = away.longest(limits[card], min(away.state, PAGES_IN_FLIGHT))
            rows.append({"model": model, "card": card, "longest": found})
    return rows
