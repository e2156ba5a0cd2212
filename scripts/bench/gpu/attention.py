"""Times causal attention on this GPU, forward and backward: ours, XLA's tiles, cuDNN, and tokamax if it is installed.

Forward and backward are two programs, as in a step, where the second has only what the first saved. FLOP are those of
the visible pairs: two products forward, five backward. Dimension key as in pallas_kernels.attention.api.
"""

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.attention.tiles import ScoreScaling
from pallas_kernels.devices import Device
from pallas_kernels.synthetic_weights import synthetic_like
from scripts.bench.gpu.matmuls import Record

PRODUCTS = {"forward": 2, "backward": 5}
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Case(NamedTuple):
    """The shape of one layer's attention."""

    name: str
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs that are visible to each head."""
        seen = min(self.window or self.length, self.length)
        return seen * (seen + 1) // 2 + (self.length - seen) * seen


CASES = (
    Case("llama-3-8b", 2048),
    Case("llama-3-8b", 8192),
    Case("llama-3-8b", 32768),
    Case("window of 1,024", 8192, window=1024),
    Case("head dim 64", 8192, heads=64, head_dim=64),
    Case("head dim 256", 8192, heads=16, kv_heads=4, head_dim=256),
)
TINY = (Case("tiny", 128, heads=2, kv_heads=1, head_dim=64),)


def measure(device: Device, case: Case, warm_up: int, samples: int) -> Record:
    """Returns the seconds of each implementation by direction, and failures by implementation."""
    sizes = [(1, case.length, n, case.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    q, k, v, do = (synthetic_like(jax.ShapeDtypeStruct(size, jnp.bfloat16), seed=i) for i, size in enumerate(sizes))
    found: Record = {**case._asdict(), "flops": 2 * case.heads * case.head_dim * case.pairs}
    found |= {"forward": {}, "backward": {}, "failures": {}}
    for name, attention in _attentions(device, case):
        try:
            forward = jax.jit(functools.partial(jax.vjp, attention))
            backward = jax.jit(lambda pullback, do: pullback(do))
            pullback = forward(q, k, v)[1]
            found["forward"][name] = _seconds(lambda run=forward: run(q, k, v), warm_up, samples)
            found["backward"][name] = _seconds(lambda run=backward, of=pullback: run(of, do), warm_up, samples)
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            found["failures"][name] = str(error)[:500]
    return found


def _attentions(device: Device, case: Case) -> Iterator[tuple[str, Attention]]:
    scale = case.head_dim**-0.5
    chosen = str(choose(device, jnp.bfloat16, case.head_dim).name)
    others = ("mma", "tiles") if chosen == "wgmma" else ("tiles",)
    for name in dict.fromkeys((chosen, *others)):
        run = IMPLEMENTATIONS[name]
        yield name, functools.partial(run, texts=None, window=case.window, scores=ScoreScaling(scale, None))
    if device.platform == "gpu":
        window = None if case.window is None else (case.window - 1, 0)
        how = {"scale": scale, "is_causal": True, "local_window_size": window}
        yield "cudnn", functools.partial(jax.nn.dot_product_attention, implementation="cudnn", **how)
    if importlib.util.find_spec("tokamax") and case.window is None:
        tokamax = importlib.import_module("tokamax")
        yield "tokamax", functools.partial(tokamax.dot_product_attention, scale=scale, is_causal=True)


def _seconds(run: Callable[[], object], warm_up: int, samples: int) -> float:
    """Returns the median seconds of a call."""
    times = []
    for _ in range(warm_up + samples):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


def lines(record: Record) -> Iterator[str]:
    """Yields one line per direction: the TFLOP/s of each implementation."""
    for way, products in PRODUCTS.items():
        flops = record["flops"] * products
        cells = [f"{name} {flops / seconds / 1e12:.1f}" for name, seconds in record[way].items()]
        yield f"attention {record['name']:<16}T={record['length']:<6}{way:<9} " + "  ".join(cells)
    yield from (f"  FAILED {name}: {why}" for name, why in record["failures"].items())
