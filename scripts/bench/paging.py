"""What paging costs in a training step: pages all resident, and all away, against plain optax, in one process.

    python -m scripts.bench.paging [--model random-15m | smollm2] [--optim adamw_8bit] [--rounds 20] [--seq 512]
        [--rank 16]

A round computes the gradients of one batch, as training does, and updates four copies of parameters and state with
them, in turns: plain optax (training.step.update); a paged run with room for the whole state (resident); pages that all
stay, as after a batch that left no room for some; and pages that all go to the host after their update (away).
Parameters must come out equal to the bit. The last line is JSON: medians in milliseconds, and the median over
rounds of (paged - plain) / plain update, and / (gradients + plain update).
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # starts again: before anything that takes long to import, as the product's commands do

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import runtime
from qlora_jax.config import OptimArgs
from qlora_jax.optim import make_elementwise, make_optimizer
from qlora_jax.optim.optax_chain import OPTIMIZERS
from qlora_jax.optim.page_layout import PAGE_BYTES, layer_pages
from qlora_jax.optim.page_pool import Memory, Transfers
from qlora_jax.optim.pager import PagedUpdate, paged_init
from qlora_jax.training.optimizer_state import make_updates
from qlora_jax.training.step import update
from scripts.bench.support.random_model import make_random_model
from scripts.bench.support.real_step import Held, hold, random_batch
from scripts.fetch_smollm2 import fetch_smollm2

MODELS = {"smollm2": fetch_smollm2, "random-15m": lambda: make_random_model("random-15m")}
STEPS = 1000
SHAPE = (1, 1, 0)  # of no matter where the budget is declared

Player = Callable[[Any], Any]  # gradients -> parameters after the update


def plain(held: Held, optim: OptimArgs) -> tuple[Player, int]:
    """(the optimizer on the whole tree, bytes of its state)."""
    optimizer, lora = make_optimizer(optim, STEPS), jax.tree.map(jnp.copy, held.parts.lora)
    state = optimizer.init(lora)

    def step(grads: Any) -> Any:
        nonlocal lora, state
        lora, state, _ = update(optimizer, lora, state, grads)
        return lora

    return step, sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def resident(held: Held, optim: OptimArgs, state_bytes: int) -> Player:
    """What a run does whose budget holds the whole state."""
    paged = dataclasses.replace(optim, paging="on", paging_budget=f"{state_bytes}B")
    updates, lora = make_updates(paged, STEPS, held.gradients), jax.tree.map(jnp.copy, held.parts.lora)
    state = updates.init(lora)

    def step(grads: Any) -> Any:
        nonlocal lora, state
        state, room, _ = updates.make_room(state, SHAPE)
        lora, state, _, _ = updates.update(lora, state, grads, room)
        return lora

    return step


class Paged:
    """The same in pages, of which a share of the bytes may stay on the device; remembers what moved last."""

    def __init__(self, held: Held, optim: OptimArgs, share: float, page_bytes: int = PAGE_BYTES):
        transform, memory = make_elementwise(optim, STEPS), Memory.of(jax.devices()[0])
        self._lora = jax.tree.map(jnp.copy, held.parts.lora)
        self.layout = layer_pages(transform, self._lora, page_bytes)
        self._state = paged_init(transform, self._lora, self.layout, memory)
        self._update = PagedUpdate(transform, self.layout, memory, 1.0)
        self._budget = int(share * self.layout.total_bytes)
        self.moved = Transfers()

    def __call__(self, grads: Any) -> Any:
        self._lora, self._state, _, self.moved = self._update(self._lora, self._state, grads, self._budget)
        return self._lora


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(milliseconds, result), the result ready."""
    began = time.perf_counter()
    result = jax.block_until_ready(work())
    return 1e3 * (time.perf_counter() - began), result


def measure(held: Held, players: dict[str, Player], batch: Any, rounds: int) -> list[dict[str, float]]:
    """Milliseconds of each round's gradients and updates; two rounds go before, for compilation and first copies.

    Raises:
      SystemExit: parameters differ.
    """
    names, records = list(players), []
    for turn in range(rounds + 2):
        lora = jax.tree.map(jnp.copy, held.parts.lora)  # gradients of the same parameters: the players' own move on
        took, (grads, _) = timed(functools.partial(held.gradients, held.parts.with_lora(lora), batch, None))
        record, results = {"gradients": took}, {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            record[name], results[name] = timed(functools.partial(players[name], grads))
        for name in names[1:]:
            same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), results[names[0]], results[name])
            if not all(jax.tree.leaves(same)):
                raise SystemExit(f"round {turn}: {name} and {names[0]} differ")
        records.append(record)
    return records[2:]


def summary(records: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and medians of ratios."""
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
    held = hold(str(MODELS[args.model]()), rank=args.rank, compute_dtype="auto", batch=shape, remat="names")
    batch = random_batch(np.random.default_rng(0), held.config.vocab_size, 1, args.seq)
    optim = OptimArgs(name=args.optim, max_grad_norm=1.0, warmup_ratio=0.0)
    whole, state_bytes = plain(held, optim)
    players = {"plain": whole, "resident": resident(held, optim, state_bytes), "pages": Paged(held, optim, 1.0)}
    players["away"] = away = Paged(held, optim, 0.0)
    told = {"model": args.model, "optim": args.optim, "pages": away.layout.count, "state_bytes": state_bytes}
    told["adapter_elements"] = sum(leaf.size for leaf in jax.tree.leaves(held.parts.lora))
    print(json.dumps(told | summary(measure(held, players, batch, args.rounds))))


if __name__ == "__main__":
    main()
