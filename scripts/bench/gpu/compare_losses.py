"""Whether a quickstart on another device learned what it learned on the CPU: its losses, step by step.

    python -m scripts.bench.gpu.compare_losses runs/gpu_check/quickstart/metrics.jsonl

The CPU's are those of seed 0 in bf16 (tests/golden/quickstart_losses.json). Each step's rows are the same; sums are
made in another order and rounded elsewhere, and updates carry that on. On the CPU, over the first steps: another order
of sums (two versions of the code) moved a loss by at most 0.8 % and the mean by 0.1 %; f32 throughout moved the losses
before any update by 0.8 %, then by 4 to 12 % in steps 3 to 6 and 2 to 5 % in steps 7 to 9. A GPU, whose compiler may
keep a value in f32 where the CPU rounds it, lies between the two.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.training.metrics import read_metrics

RECORDED = Path(__file__).resolve().parents[3] / "tests/golden/quickstart_losses.json"
UNTRAINED = 2  # steps whose loss is the base's: the first update has learning rate 0
FIRST, EACH, MEAN = 0.02, 0.15, 0.04  # relative; the mean is of all steps compared


def problems(losses: Sequence[float], recorded: Sequence[float]) -> list[str]:
    """What is beyond tolerance, of losses of the first steps or of all."""
    if not losses or len(losses) > len(recorded):
        return [f"{len(losses)} losses, recorded are {len(recorded)}"]
    found = []
    for step, (loss, expected) in enumerate(zip(losses, recorded, strict=False), 1):
        allowed = FIRST if step <= UNTRAINED else EACH
        if not abs(loss / expected - 1) <= allowed:  # a NaN is beyond it too
            found.append(f"step {step}: loss {loss:.4f}, recorded {expected:.4f}: more than {allowed:.0%} apart")
    mean, expected = statistics.fmean(losses), statistics.fmean(recorded[: len(losses)])
    if not abs(mean / expected - 1) <= MEAN:
        found.append(f"mean loss {mean:.4f}, recorded {expected:.4f}: more than {MEAN:.0%} apart")
    return found


def main(path: str) -> int:
    """1 where there is a problem."""
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
