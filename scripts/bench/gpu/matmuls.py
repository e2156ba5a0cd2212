"""Times products with 4-bit weights on this GPU: fused kernels with each tile, the reference, and bf16 cuBLAS.

A time is that of one product among many in a program, each with a separate weight, so that Python calls and weights in
the second-level cache do not affect it; kernel launches do. The programs run until warm, then each is waited for; the
median counts. Dimension key: M rows, N out, K in.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense_matmul import dot
from pallas_kernels.devices import Device, target_device
from pallas_kernels.dispatch import DIRECTIONS, Direction, preference
from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.kernel_report import abstract_weight
from pallas_kernels.nf4_matmul import reference
from pallas_kernels.nf4_matmul.costs import product_flops, roofline, weight_bytes
from pallas_kernels.nf4_matmul.mosaic import ampere, ampere_instructions, hopper, skinny, skinny_instructions
from pallas_kernels.nf4_matmul.mosaic.capabilities import MOST_ROWS
from pallas_kernels.nf4_matmul.mosaic.operands import operands
from pallas_kernels.nf4_matmul.shapes import Shape
from pallas_kernels.synthetic_weights import synthetic_like
from qlora_jax.untrusted_json import JsonObject

LAYOUT = "split_k"
TARGET_S = 2e-3  # minimum duration of a program, which decides how many products it has
MOST_REPEATS = 32
Record = JsonObject
Product = Callable[..., jax.Array]  # (rows, 4-bit or dense weight) -> result
Interpreter = plgpu.InterpretGPUParams | None


class Tile(Protocol):
    """The tile of a kernel."""

    @property
    def rows(self) -> int: ...

    @property
    def steps(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Parameters of the measurement.

    Attributes:
      interpret: parameters of the interpreter, which replaces the kernels; None to run kernels.
      peak, bandwidth: FLOP/s and bytes/s of the card.
      memory: maximum bytes of weights, and of results.
      warm_up, samples: number of calls that do not count, and that count.
    """

    device: Device
    interpret: Interpreter
    peak: float
    bandwidth: float
    memory: int
    warm_up: int
    samples: int


# Kernels with a tile, as (rows, weight) -> product


def _hopper(direction: Direction, tile: hopper.Tile, interpret: Interpreter) -> Product:
    of_tile = {"forward": hopper.forward_product, "backward": hopper.backward_product}[direction]
    return lambda rows, weight: of_tile(rows, operands(weight, None, rows.dtype), tile, interpret)


def _ampere(direction: Direction, tile: ampere.Tile, interpret: Interpreter) -> Product:
    table, dtype = CODE_TABLES["nf4"], jnp.bfloat16
    if interpret is None:
        instructions = ampere.machine_for(target_device())(direction, dtype, table)
    else:
        instructions = ampere_instructions.Interpreted(direction, dtype, table, interpret)
    return lambda rows, weight: ampere.product(instructions, rows, operands(weight, None, dtype), tile)


def _skinny(direction: Direction, tile: None, interpret: Interpreter) -> Product:
    assert direction == "forward" and tile is None
    table, dtype = CODE_TABLES["nf4"], jnp.bfloat16
    if interpret is None:
        instructions = skinny_instructions.Machine(dtype, table)
    else:
        instructions = skinny_instructions.Interpreted(dtype, table, interpret)
    return lambda rows, weight: skinny.product(instructions, rows, operands(weight, None, dtype))


class Kernel(NamedTuple):
    """A fused kernel.

    Fields:
      product: (direction, tile, interpreter) -> product.
      tiles: the tiles of each direction.
      chosen: (device, direction, M, width) -> the tile that the kernel selects.
      most_rows: the largest M that is timed. It exceeds the M at which dispatch leaves the kernel, if there is one.
    """

    product: Callable[..., Product]
    tiles: Mapping[Direction, Sequence[Tile | None]]
    chosen: Callable[..., Tile | None]
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


# Measurement


def _reference(direction: Direction) -> Product:
    run = {"forward": reference.forward, "backward": reference.backward}[direction]
    return lambda rows, weight: run(rows, weight, None)


def _dense(direction: Direction) -> Product:
    contracted = (1, 1) if direction == "forward" else (1, 0)
    return lambda rows, dense: dot(rows, dense, contracted, rows.dtype)


def measure(bench: Bench, shape: Shape, rows: int) -> Record:
    """Returns the seconds of every kernel and tile, `reference` and `bf16`, at one shape and M, by direction."""
    ways = {way: _measure_way(bench, shape, rows, way) for way in DIRECTIONS}
    return {"shape": shape.name, "n": shape.n, "k": shape.k, "m": rows, **ways}


def _measure_way(bench: Bench, shape: Shape, rows: int, way: Direction) -> Record:
    under = roofline(rows, shape.nk, LAYOUT, fused=True, peak=bench.peak, bandwidth=bench.bandwidth)
    room = min(bench.memory // (2 * shape.n * shape.k), bench.memory // (2 * rows * max(shape.nk)))
    repeats = max(1, min(MOST_REPEATS, math.ceil(TARGET_S / under.seconds), room))
    width, columns = (shape.k, shape.n) if way == "forward" else (shape.n, shape.k)
    given = synthetic_like(jax.ShapeDtypeStruct((rows, width), jnp.bfloat16))
    weights = [synthetic_like(abstract_weight(shape.nk, LAYOUT), seed=100 * i) for i in range(repeats)]
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
    dense = [synthetic_like(jax.ShapeDtypeStruct(shape.nk, jnp.bfloat16), seed=i) for i in range(repeats)]
    return found | {"bf16": _seconds(bench, _dense(way), given, dense, found["failures"], "bf16")}


def _fused(bench: Bench, rows: int, way: Direction) -> Iterator[tuple[str, Tile | None, Product]]:
    names = KERNELS if bench.interpret is not None else preference(bench.device)
    for name in names:
        if name in KERNELS and rows <= KERNELS[name].most_rows:
            for tile in KERNELS[name].tiles[way]:
                yield name, tile, KERNELS[name].product(way, tile, bench.interpret)


def _tile_name(tile: Tile | None) -> str:
    return "one" if tile is None else f"{tile.rows} rows, {tile.steps} steps"


def _seconds(
    bench: Bench, product: Product, given: jax.Array, weights: list, failures: dict[str, str], name: str
) -> float | None:
    """Returns the seconds of one product; None if the device fails, which is recorded in `failures`."""
    try:
        return _median_seconds(bench, _program(product), given, weights) / len(weights)
    except jax.errors.JaxRuntimeError as error:
        failures[name] = str(error)[:500]
        return None


def _program(product: Product) -> Callable[[jax.Array, list], list[jax.Array]]:
    """Returns a program of one product per weight, in order; barriers keep XLA from fusing two products."""
    one = jax.jit(product)

    def every(rows, weights):
        results = []
        for weight in weights:
            result, rows = jax.lax.optimization_barrier((one(rows, weight), rows))
            results.append(result)
        return results

    return jax.jit(every)


def _median_seconds(
    bench: Bench, program: Callable[[jax.Array, list], list[jax.Array]], rows: jax.Array, weights: list
) -> float:
    """Returns the median seconds of a call, including the wait for its results."""
    taken = []
    for _ in range(bench.warm_up + bench.samples):
        began = time.perf_counter()
        jax.block_until_ready(program(rows, weights))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[bench.warm_up :])


def tflops(record: Record, seconds: float) -> float:
    """Returns 2 M N K / seconds, in TFLOP/s."""
    return product_flops(record["m"], (record["n"], record["k"])) / seconds / 1e12


def gigabytes_per_second(record: Record, seconds: float) -> float:
    """Returns the GB/s of the necessary reads and writes: codes, stored constants, rows and result."""
    stored, sizes = weight_bytes((record["n"], record["k"]), LAYOUT), record["n"] + record["k"]
    return (stored.codes + stored.constants + 2 * record["m"] * sizes) / seconds / 1e9
