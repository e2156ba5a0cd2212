"""Measures the cost of pages on this machine's CPU, by budget and page size.

    python -m scripts.study_paging.costs [--rounds 12] > costs.json

Runs SmolLM2-135M at rank 64 (156 MB of state) with 512 tokens in one process. A round computes one batch's gradients
and passes them to plain optax and to each paged update in turn; parameters must be bit-identical. On a CPU the cores
that compute also make the copies, so the figures do not show how much of them a GPU would hide.
"""

import argparse
import json

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import numpy as np

from qlora_jax import runtime
from qlora_jax.config import OptimArgs
from scripts.bench.paging import Paged, measure, plain, summary
from scripts.bench.support.real_step import load_step, random_batch
from scripts.fetch_smollm2 import fetch_smollm2
from scripts.study_paging.report import CostRow

RANK, LENGTH = 64, 512
OPTIM = OptimArgs(name="adamw_32bit", max_grad_norm=1.0, warmup_ratio=0.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # budget as a share of the state
LAYER = 5_210_112  # bytes of m and v of one layer
PAGE_LAYERS = (1, 2, 6, 15, 30)
BUDGETS = {"away": 0.0, "resident": 1.0}
BUDGET_PAGE = 2  # layers per page while the budget varies


def row(name: str, update: Paged, medians: dict[str, float]) -> CostRow:
    """Returns the figures of one update."""
    kind, value = name.split()
    return {
        "kind": kind,
        "value": float(value),
        "pages": update.layout.count,
        "page_bytes": update.layout.largest_page,
        "moved_bytes": update.moved.bytes_in + update.moved.bytes_out,
        "update_ms": medians[f"{name}_ms"],
        "over_step": medians[f"{name}_over_step"],
    }


def main() -> None:
    """Measures all updates and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    runtime.start()
    loaded = load_step(str(fetch_smollm2()), rank=RANK, compute_dtype="auto", batch=(1, 1, LENGTH), remat="names")
    batch = random_batch(np.random.default_rng(0), loaded.config.vocab_size, 1, LENGTH)
    budgets = {f"budget {share}": Paged(loaded, OPTIM, share, BUDGET_PAGE * LAYER) for share in SHARES}
    sizes = {
        f"{where} {k}": Paged(loaded, OPTIM, share, k * LAYER) for k in PAGE_LAYERS for where, share in BUDGETS.items()
    }
    updates = budgets | sizes
    medians = summary(measure(loaded, {"plain": plain(loaded, OPTIM)[0]} | updates, batch, rounds))
    totals = {f"{name}_ms": medians[f"{name}_ms"] for name in ("gradients", "plain")}
    rows = [row(name, update, medians) for name, update in updates.items()]
    print(json.dumps({**totals, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
