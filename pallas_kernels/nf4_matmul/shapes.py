"""Shapes of real models' frozen linear layers, by name, and reduced shapes for tests on a CPU.

Dimension key: N out, K in.
"""

from typing import NamedTuple

TILE = 256  # a multiple of every kernel's tile, of K groups of 128, and of blocks of 64


class Shape(NamedTuple):
    """A weight (N, K) of a published model, its count per layer, and the number of layers."""

    model: str
    projection: str
    n: int
    k: int
    in_layer: int
    layers: int

    @property
    def name(self) -> str:
        """The shape's name, such as `llama-2-7b/down`."""
        return f"{self.model}/{self.projection}"

    @property
    def nk(self) -> tuple[int, int]:
        """(N, K)."""
        return self.n, self.k


# Model -> (width, equal to that of all query heads; width of keys or values; inner width of the MLP; layers).
MODELS: dict[str, tuple[int, int, int, int]] = {
    "smollm2-135m": (576, 192, 1536, 30),  # 576 = 4.5 x 128, 192 = 1.5 x 128
    "qwen2-0.5b": (896, 128, 4864, 24),  # 896 = 3.5 x 256
    "llama-3.2-1b": (2048, 512, 8192, 16),
    "llama-2-7b": (4096, 4096, 11008, 32),
    "llama-3-8b": (4096, 1024, 14336, 32),
    "llama-2-13b": (5120, 5120, 13824, 40),
    "llama-33b": (6656, 6656, 17920, 60),
    "llama-65b": (8192, 8192, 22016, 80),
    "llama-3-70b": (8192, 1024, 28672, 80),
}


def _of_model(model: str) -> list[Shape]:
    width, kv, inner, layers = MODELS[model]
    attention = [("q,o", width, 2), ("k,v", kv, 2)] if kv != width else [("q,k,v,o", width, 4)]
    projections = [(name, n, width, count) for name, n, count in attention]
    projections += [("gate,up", inner, width, 2), ("down", width, inner, 1)]
    return [Shape(model, name, n, k, count, layers) for name, n, k, count in projections]


SHAPES: dict[str, Shape] = {shape.name: shape for model in MODELS for shape in _of_model(model)}


def reduced(size: int) -> int:
    """Returns a size below 2 TILE with the same remainder modulo TILE."""
    return size if size < 2 * TILE else TILE + size % TILE


REDUCED: tuple[tuple[int, int], ...] = tuple(
    dict.fromkeys((reduced(shape.n), reduced(shape.k)) for shape in SHAPES.values())
)
