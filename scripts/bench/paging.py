"""Measures the cost of paging in a training step: all pages resident, and all evicted, compared with plain optax.

    python -m scripts.bench.paging [--model random-15m | smollm2] [--optim adamw_8bit] [--rounds 20] [--seq 512]
        [--rank 16]

A round computes the gradients of one batch, as training does. It then updates four copies of parameters and state in
turns, in one process: plain optax (training.step.update); a paged run whose budget holds the whole state (resident);
pages that all stay on the device, as after a batch that left no room for some (pages); and pages that are all evicted
after their update (away). Parameters must be bit-identical. The last line is JSON: medians in milliseconds, the bytes
that `away` moves per update, and the median over rounds of (paged - plain) / plain update, and / (gradients + plain
update).
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import runtime
from qlora_jax.config import OptimArgs
from qlora_jax.models.partition import Lora
from qlora_jax.optim import make_elementwise, make_optimizer
from qlora_jax.optim.optax_chain import OPTIMIZERS
from qlora_jax.optim.page_layout import PAGE_BYTES, layer_pages
from qlora_jax.optim.page_pool import Memory, Transfers
from qlora_jax.optim.pager import PagedUpdate, paged_init
from qlora_jax.training.optimizer_state import make_state_manager
from qlora_jax.training.step import update
from scripts.bench.support.progress import phases
from scripts.bench.support.random_model import make_random_model
from scripts.bench.support.real_step import LoadedStep, load_step, random_batch
from scripts.fetch_smollm2 import fetch_smollm2

MODELS = {"smollm2": fetch_smollm2, "random-15m": lambda: make_random_model("random-15m")}
STEPS = 1000
SHAPE = (1, 1, 0)  # ignored, because the budget is declared

Update = Callable[[Lora], Lora]  # gradients -> parameters after the update


def plain(loaded: LoadedStep, optim: OptimArgs) -> tuple[Update, int]:
    """Returns the update of the whole tree, and the bytes of its state."""
    optimizer, lora = make_optimizer(optim, STEPS), jax.tree.map(jnp.copy, loaded.parts.lora)
    state = optimizer.init(lora)

    def step(grads: Lora) -> Lora:
        nonlocal lora, state
        lora, state, _ = update(optimizer, lora, state, grads)
        return lora

    return step, sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def resident(loaded: LoadedStep, optim: OptimArgs, state_bytes: int) -> Update:
    """Returns the update of a paged run whose budget holds the whole state."""
    paged = dataclasses.replace(optim, paging="on", paging_budget=f"{state_bytes}B")
    updates, lora = make_state_manager(paged, STEPS, loaded.gradients), jax.tree.map(jnp.copy, loaded.parts.lora)
    state = updates.init(lora)

    def step(grads: Lora) -> Lora:
        nonlocal lora, state
        state, room, _ = updates.make_room(state, SHAPE)
        lora, state, _, _ = updates.update(lora, state, grads, room)
        return lora

    return step


class Paged:
    """The update in pages; a share of their bytes may stay on the device; `moved` counts the last update."""

    def __init__(self, loaded: LoadedStep, optim: OptimArgs, share: float, page_bytes: int = PAGE_BYTES):
        transform, memory = make_elementwise(optim, STEPS), Memory.of(jax.devices()[0])
        self._lora = jax.tree.map(jnp.copy, loaded.parts.lora)
        self.layout = layer_pages(transform, self._lora, page_bytes)
        self._state = paged_init(transform, self._lora, self.layout, memory)
        self._update = PagedUpdate(transform, self.layout, memory, 1.0)
        self._budget = int(share * self.layout.total_bytes)
        self.moved = Transfers()

    def __call__(self, grads: Lora) -> Lora:
        self._lora, self._state, _, self.moved = self._update(self._lora, self._state, grads, self._budget)
        return self._lora


def timed[T](work: Callable[[], T]) -> tuple[float, T]:
    """Returns the milliseconds until the result is ready, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(work())
    return 1e3 * (time.perf_counter() - began), result


def measure(
    loaded: LoadedStep, updates: dict[str, Update], batch: dict[str, np.ndarray], rounds: int
) -> list[dict[str, float]]:
    """Returns the milliseconds of each round's gradients and updates, after two rounds that compile and warm up.

    Raises:
      SystemExit: parameters differ.
    """
    names, records = list(updates), []
    for turn in phases("round", range(rounds + 2)):
        lora = jax.tree.map(jnp.copy, loaded.parts.lora)  # the updates change their copies
        took, (grads, _) = timed(functools.partial(loaded.gradients, loaded.parts.with_lora(lora), batch, None))
        record, results = {"gradients": took}, {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            record[name], results[name] = timed(functools.partial(updates[name], grads))
        for name in names[1:]:
            same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), results[names[0]], results[name])
            if not all(jax.tree.leaves(same)):
                raise SystemExit(f"round {turn}: {name} and {names[0]} differ")
        records.append(record)
    return records[2:]


def summary(records: list[dict[str, float]]) -> dict[str, float]:
    """Returns medians, and medians of ratios."""
    result = {f"{name}_ms": statistics.median(record[name] for record in records) for name in records[0]}
    for name in [name for name in records[0] if name not in ("gradients", "plain")]:
        more = [record[name] - record["plain"] for record in records]
        steps = [record["gradients"] + record["plain"] for record in records]
        result[f"{name}_over_update"] = statistics.median(m / r["plain"] for m, r in zip(more, records, strict=True))
        result[f"{name}_over_step"] = statistics.median(m / s for m, s in zip(more, steps, strict=True))
    return {key: round(value, 5) for key, value in result.items()}


def main() -> None:
    """Measures one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--optim", choices=OPTIMIZERS, default="adamw_32bit")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    runtime.start()
    shape = (1, 1, args.seq)
    loaded = load_step(str(MODELS[args.model]()), rank=args.rank, compute_dtype="auto", batch=shape, remat="names")
    batch = random_batch(np.random.default_rng(0), loaded.config.vocab_size, 1, args.seq)
    optim = OptimArgs(name=args.optim, max_grad_norm=1.0, warmup_ratio=0.0)
    whole, state_bytes = plain(loaded, optim)
    updates = {"plain": whole, "resident": resident(loaded, optim, state_bytes), "pages": Paged(loaded, optim, 1.0)}
    updates["away"] = away = Paged(loaded, optim, 0.0)
    facts = {"model": args.model, "optim": args.optim, "pages": away.layout.count, "state_bytes": state_bytes}
    facts["adapter_elements"] = sum(leaf.size for leaf in jax.tree.leaves(loaded.parts.lora))
    found = summary(measure(loaded, updates, batch, args.rounds))
    facts |= {"moved_bytes": away.moved.bytes_in + away.moved.bytes_out, "problems": away.moved.problems}
    print(json.dumps(facts | found))


if __name__ == "__main__":
    main()
