"""Times of products with 4-bit weights on this GPU: fused kernels with each of their tiles, the reference, bf16 cuBLAS.

A time is that of one product among many in a program, each with a weight of its own, so that neither a call from Python
nor a second-level cache that holds a weight makes it; the launches of kernels are in it. The programs are run until
warm, then each is waited for; the median counts. Dimension key: M rows, N out, K in.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense_matmul import dot
from pallas_kernels.devices import Device
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.kernel_report import abstract_weight
from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.api import preference
from pallas_kernels.nf4_matmul.costs import held, product_flops, roof
from pallas_kernels.nf4_matmul.dispatch import DIRECTIONS, Direction
from pallas_kernels.nf4_matmul.mosaic import ampere, ampere_instructions, hopper, skinny, skinny_instructions
from pallas_kernels.nf4_matmul.mosaic.capabilities import MOST_ROWS
from pallas_kernels.nf4_matmul.mosaic.operands import operands
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.synthetic_weights import scattered_like

LAYOUT = "split_k"
TARGET_S = 2e-3  # that a program should take at least, in as many products as that wants
MOST_REPEATS = 32
Record = dict[str, Any]
Product = Callable[[jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """How to measure.

    Attributes:
      interpret: parameters of the interpreter, whose twins then stand in for kernels; None: kernels.
      peak, bandwidth: of the card, FLOP/s and bytes/s.
      memory: bytes that weights, and that results, may take.
      warm_up, samples: calls before those that count, and those.
    """

    device: Device
    interpret: plgpu.InterpretGPUParams | None
    peak: float
    bandwidth: float
    memory: int
    warm_up: int
    samples: int


# The kernels with a tile, as (rows, weight) -> product


def _hopper(direction: Direction, tile: Any, interpret: Any) -> Product:
    of_tile = {"forward": hopper.forward_product, "backward": hopper.backward_product}[direction]
    return lambda rows, weight: of_tile(rows, operands(weight, None, rows.dtype), tile, interpret)


def _ampere(direction: Direction, tile: Any, interpret: Any) -> Product:
    table, dtype = CODE_TABLES["nf4"], jnp.bfloat16
    if interpret is None:
        instructions = ampere_instructions.Machine(direction, dtype, table)
    else:
        instructions = ampere_instructions.Interpreted(direction, dtype, table, interpret)
    return lambda rows, weight: ampere.product(instructions, rows, operands(weight, None, dtype), tile)


def _skinny(direction: Direction, tile: Any, interpret: Any) -> Product:
    assert direction == "forward" and tile is None
    table, dtype = CODE_TABLES["nf4"], jnp.bfloat16
    if interpret is None:
        instructions = skinny_instructions.Machine(dtype, table)
    else:
        instructions = skinny_instructions.Interpreted(dtype, table, interpret)
    return lambda rows, weight: skinny.product(instructions, rows, operands(weight, None, dtype))


class Kernel(NamedTuple):
    """A fused kernel: its product for a tile, its tiles by direction, and which of them it takes itself.

    Fields:
      most_rows: beyond which it is not timed; kernels that dispatch leaves at some M are timed beyond it.
    """

    product: Callable[[Direction, Any, Any], Product]
    tiles: dict[Direction, tuple[Any, ...]]
    chosen: Callable[[Device, Direction, int, int], Any]
    most_rows: float = math.inf


_AMPERE_TILES = (ampere.SMALL, ampere.LARGE)
KERNELS = {
    "hopper": Kernel(_hopper, hopper.TILES, lambda device, way, rows, width: hopper.best_tile(way, rows, width)),
    "ampere": Kernel(
        _ampere,
        {"forward": _AMPERE_TILES, "backward": _AMPERE_TILES},
        lambda device, way, rows, width: ampere.tile_for(device, rows, width),
    ),
    "skinny": Kernel(_skinny, {"forward": (None,), "backward": ()}, lambda *call: None, MOST_ROWS["skinny"].rows),
}


# What is timed


def _reference(direction: Direction) -> Product:
    run = {"forward": reference.forward, "backward": reference.backward}[direction]
    return lambda rows, weight: run(rows, weight, None)


def _dense(direction: Direction) -> Product:
    contracted = (1, 1) if direction == "forward" else (1, 0)
    return lambda rows, dense: dot(rows, dense, contracted, rows.dtype)


def measure(bench: Bench, shape: Shape, rows: int) -> Record:
    """Both directions of one shape at one M: seconds of every kernel with every tile, `reference` and `bf16`."""
    ways = {way: _measure_way(bench, shape, rows, way) for way in DIRECTIONS}
    return {"shape": shape.name, "n": shape.n, "k": shape.k, "m": rows, **ways}


def _measure_way(bench: Bench, shape: Shape, rows: int, way: Direction) -> Record:
    repeats = _repeats(bench, shape, rows)
    width, columns = (shape.k, shape.n) if way == "forward" else (shape.n, shape.k)
    given = scattered_like(jax.ShapeDtypeStruct((rows, width), jnp.bfloat16))
    weights = [scattered_like(abstract_weight(shape.nk, LAYOUT), seed=100 * i) for i in range(repeats)]
    found: Record = {"repeats": repeats, "tiles": {}, "failures": {}}
    for name, tile, product in _fused(bench, rows, way):
        seconds = _seconds(bench, product, given, weights, found["failures"], f"{name} {tile}")
        found["tiles"].setdefault(name, {})[_tile_name(tile)] = seconds
    for name in found["tiles"]:
        tile = KERNELS[name].chosen(bench.device, way, rows, columns)
        found[name] = found["tiles"][name][_tile_name(tile)]
        found.setdefault("chosen", {})[name] = _tile_name(tile)
    found["reference"] = _seconds(bench, _reference(way), given, weights, found["failures"], "reference")
    del weights
    dense = [scattered_like(jax.ShapeDtypeStruct(shape.nk, jnp.bfloat16), seed=i) for i in range(repeats)]
    return found | {"bf16": _seconds(bench, _dense(way), given, dense, found["failures"], "bf16")}


def _fused(bench: Bench, rows: int, way: Direction) -> Iterator[tuple[str, Any, Product]]:
    names = KERNELS if bench.interpret is not None else preference(bench.device)
    for name in names:
        if name in KERNELS and rows <= KERNELS[name].most_rows:
            for tile in KERNELS[name].tiles[way]:
                yield name, tile, KERNELS[name].product(way, tile, bench.interpret)


def _tile_name(tile: Any) -> str:
    return "one" if tile is None else f"{tile.rows} rows, {tile.steps} steps"


def _repeats(bench: Bench, shape: Shape, rows: int) -> int:
    """Products of a program: as many as TARGET_S wants, memory allows for weights and results, and MOST_REPEATS."""
    under = roof(rows, shape.nk, LAYOUT, fused=True, peak=bench.peak, bandwidth=bench.bandwidth)
    room = min(bench.memory // (2 * shape.n * shape.k), bench.memory // (2 * rows * max(shape.nk)))
    return max(1, min(MOST_REPEATS, math.ceil(TARGET_S / under.seconds), room))


def _seconds(
    bench: Bench, product: Product, given: jax.Array, weights: list[Any], failures: dict[str, str], name: str
) -> float | None:
    """Of one product; None where the device refuses it, which is told and does not end the others."""
    try:
        return _median_seconds(bench, _program(product), given, weights) / len(weights)
    except jax.errors.JaxRuntimeError as error:
        failures[name] = str(error)[:500]
        return None


def _program(product: Product) -> Callable[..., Any]:
    """A product with each weight, one after the other: barriers keep XLA from joining what belongs to two."""
    one = jax.jit(product)

    def every(rows, weights):
        results = []
        for weight in weights:
            result, rows = jax.lax.optimization_barrier((one(rows, weight), rows))
            results.append(result)
        return results

    return jax.jit(every)


def _median_seconds(bench: Bench, program: Callable[..., Any], *args: Any) -> float:
    """Of a call until its results are there."""
    taken = []
    for _ in range(bench.warm_up + bench.samples):
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[bench.warm_up :])


def tflops(record: Record, seconds: float) -> float:
    """2 M N K / seconds, in 1e12."""
    return product_flops(record["m"], (record["n"], record["k"])) / seconds / 1e12


def gigabytes_per_second(record: Record, seconds: float) -> float:
    """What a product has to read and write (codes, constants as they are held, rows, result) / seconds, in 1e9."""
    kept, sizes = held((record["n"], record["k"]), LAYOUT), record["n"] + record["k"]
    return (kept.codes + kept.constants + 2 * record["m"] * sizes) / seconds / 1e9
