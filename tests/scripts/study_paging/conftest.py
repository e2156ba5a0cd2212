"""A model with compiled steps given by hand, so that tests compile nothing."""

import pytest

from scripts.study_paging import memory

MIB = 2**20


@pytest.fixture
def seven():
    """Returns LLaMA-7B with 100 MiB of scratch at 512 tokens, 200 at 2048, and 1736 at 8192."""
    sizes = {512: 100, 2048: 200, 8192: 1736}
    points = [memory.Point("llama-7b", "a6000", "full", length, size * MIB) for length, size in sizes.items()]
    return memory.StepMemory.of(points, "llama-7b", "a6000", "full")
