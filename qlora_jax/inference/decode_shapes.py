"""The few shapes that decoding has, so that the number of compilations is small and known."""

from collections.abc import Sequence

from qlora_jax.models.config import ModelConfig

PREFILL_CHUNKS = (64, 256, 512)  # tokens of a prompt that go through the model at once
BATCHES = (1, 2, 4, 8, 16)  # rows decoded together
FIRST_SLOTS = 256  # a cache has this many slots, or twice, or four times as many ...


def round_up(number: int, sizes: Sequence[int]) -> int:
    """The first of ascending sizes that is at least `number`."""
    return next(size for size in sizes if size >= number)


def slots_for(needed: int, config: ModelConfig) -> int:
    """Of a cache for so many positions."""
    slots = FIRST_SLOTS
    while slots < needed:
        slots *= 2
    return min(slots, config.max_positions)


def chunks(length: int) -> list[tuple[int, int]]:
    """(start, size) of the chunks that a prompt goes through the model in; the last may reach over its end."""
    largest = PREFILL_CHUNKS[-1]
    starts = range(0, length, largest)
    return [(start, round_up(min(length - start, largest), PREFILL_CHUNKS)) for start in starts]
