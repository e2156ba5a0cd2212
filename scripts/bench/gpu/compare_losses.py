"""Compares the losses of a quickstart on another device with those on the CPU, step by step.

    python -m scripts.bench.gpu.compare_losses runs/gpu_check/quickstart/metrics.jsonl

The CPU's losses are those of seed 0 in bf16 (tests/golden/quickstart_losses.json). The rows of each step are the same,
but sums have another order and other roundings, and updates accumulate the difference. On the CPU, over the first
steps, another order of sums (two versions of the code) moved a loss by at most 0.8 % and the mean by 0.1 %. f32
throughout moved the losses before any update by 0.8 %, then by 4 to 12 % in steps 3 to 6 and 2 to 5 % in steps 7 to 9.
A GPU, whose compiler may keep a value in f32 where the CPU rounds it, lies between the two.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.training.metrics.metrics_file import read_metrics

RECORDED = Path(__file__).resolve().parents[3] / "tests/golden/quickstart_losses.json"
UNTRAINED = 2  # steps with the loss of the base: the first update has learning rate 0
FIRST, EACH, MEAN = 0.02, 0.15, 0.04  # relative tolerances; the mean is over all compared steps


def problems(losses: Sequence[float], recorded: Sequence[float]) -> list[str]:
    """Returns a message per difference beyond tolerance; `losses` may be those of the first steps only."""
    if not losses or len(losses) > len(recorded):
        return [f"{len(losses)} losses (expected 1 to {len(recorded)})"]
    found = []
    for step, (loss, expected) in enumerate(zip(losses, recorded, strict=False), 1):
        allowed = FIRST if step <= UNTRAINED else EACH
        if not abs(loss / expected - 1) <= allowed:  # also true for NaN
            found.append(f"step {step}: loss {loss:.4f}, recorded {expected:.4f}: differs by more than {allowed:.0%}")
    mean, expected = statistics.fmean(losses), statistics.fmean(recorded[: len(losses)])
    if not abs(mean / expected - 1) <= MEAN:
        found.append(f"mean loss {mean:.4f}, recorded {expected:.4f}: differs by more than {MEAN:.0%}")
    return found


def main(path: str) -> int:
    """Compares the metrics file at `path`; returns the exit code."""
    recorded = json.loads(RECORDED.read_text())
    losses = [record["loss"] for record in read_metrics(path) if "loss" in record]
    losses = [float("nan") if loss is None else loss for loss in losses]
    found = problems(losses, recorded)
    largest = max((abs(a / b - 1) for a, b in zip(losses, recorded, strict=False)), default=float("nan"))
    print(f"{len(losses)} of {len(recorded)} steps compared, largest relative difference {largest:.2%}")
    print("\n".join(found) if found else "losses: equal within tolerance")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
