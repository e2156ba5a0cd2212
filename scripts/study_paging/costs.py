"""What pages cost on this machine's CPU, by budget and by size of page: the part of the study that is measured.

    python -m scripts.study_paging.costs [--rounds 12] > costs.json

One process, SmolLM2-135M at rank 64 (whose state is 156 MB), 512 tokens. A round computes one batch's gradients and
hands them to plain optax and to each paged update in turn; parameters must come out equal to the bit. On a CPU a copy
between device and host is a memcpy by the cores that compute, so nothing here says what a GPU hides.
"""

import argparse
import json
from typing import Any

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # starts again: before anything that takes long to import, as the product's commands do

import numpy as np

from qlora_jax import runtime
from qlora_jax.config import OptimArgs
from scripts.bench.paging import Paged, measure, plain, summary
from scripts.bench.support.real_step import hold, random_batch
from scripts.fetch_smollm2 import fetch_smollm2

RANK, LENGTH = 64, 512
OPTIM = OptimArgs(name="adamw_32bit", max_grad_norm=1.0, warmup_ratio=0.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the state that may stay on the device
LAYER = 5_210_112  # bytes of m and v of one layer
PAGES_OF = (1, 2, 6, 15, 30)  # layers
WHERE = {"away": 0.0, "resident": 1.0}
BUDGET_PAGE = 2  # layers of a page while the budget is varied


def players_of(held: Any) -> dict[str, Paged]:
    """By budget at one size of page, and by size of page all resident and all away."""
    budgets = {f"budget {share}": Paged(held, OPTIM, share, BUDGET_PAGE * LAYER) for share in SHARES}
    sizes = {f"{where} {k}": Paged(held, OPTIM, share, k * LAYER) for k in PAGES_OF for where, share in WHERE.items()}
    return budgets | sizes


def row(name: str, player: Paged, found: dict[str, float]) -> dict[str, Any]:
    """One player's numbers."""
    kind, value = name.split()
    return {
        "kind": kind,
        "value": float(value),
        "pages": player.layout.count,
        "page_bytes": player.layout.largest_page,
        "moved_bytes": player.moved.bytes_in + player.moved.bytes_out,
        "update_ms": found[f"{name}_ms"],
        "over_step": found[f"{name}_over_step"],
    }


def main() -> None:
    """Measures, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    runtime.start()
    held = hold(str(fetch_smollm2()), rank=RANK, compute_dtype="auto", batch=(1, 1, LENGTH), remat="names")
    batch = random_batch(np.random.default_rng(0), held.config.vocab_size, 1, LENGTH)
    players = players_of(held)
    records = measure(held, {"plain": plain(held, OPTIM)[0]} | players, batch, rounds)
    found = summary(records)
    told = {f"{name}_ms": found[f"{name}_ms"] for name in ("gradients", "plain")}
    rows = [row(name, player, found) for name, player in players.items()]
    print(json.dumps({**told, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
