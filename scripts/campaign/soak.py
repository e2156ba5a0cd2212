"""Trains, evaluates and saves for a long time in one process, and fits a line to its memory: it must not grow.

    python -m scripts.campaign.soak --hours 1 --output DIR

Fits resident memory over time in the second half, with a 95 % interval by bootstrapping blocks of samples. Fails if
the whole interval is above zero. Prints one line, and appends it to DIR/soak.jsonl.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.campaign.commands import Running
from scripts.campaign.run_results import CACHE, CONFIG, TinyRun, moved, write_settings

SETTINGS = {
    "train": dict(
        steps=10_000_000, save_every=5, eval_every=20, keep_best=True, samples="prompts.txt", sample_tokens=4
    ),
    "data": dict(eval_fraction=0.2),
    "lora": dict(rank=64),
    "optim": dict(name="paged_adamw_8bit", paging="on", paging_budget="160KiB"),
}
BLOCKS, DRAWS = 20, 2000


class Slope(NamedTuple):
    """Growth in bytes per hour, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def slope(hours: Sequence[float], sizes: Sequence[float]) -> Slope:
    """Fits a line to sizes; draws blocks with replacement, because neighbouring samples depend on each other."""
    rng = np.random.default_rng(0)
    blocks = np.array_split(np.arange(len(hours)), BLOCKS)
    x, y = np.asarray(hours), np.asarray(sizes, float)

    def fit(indices: np.ndarray) -> float:
        return float(np.polyfit(x[indices], y[indices], 1)[0])

    drawn = [fit(np.concatenate([blocks[i] for i in rng.integers(0, BLOCKS, BLOCKS)])) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Slope(fit(np.arange(len(x))), float(low), float(high))


def resident(pid: int) -> int:
    """Returns the resident memory of a process, in bytes."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096


def watch(process: Running, hours: float, every: float, size: Callable[[], int]) -> list[tuple[float, int]]:
    """Samples the size of a running process; returns (hours since the start, bytes)."""
    began, samples = time.monotonic(), []
    while (now := (time.monotonic() - began) / 3600) < hours and not process.ended():
        samples.append((now, size()))
        time.sleep(every)
    return samples


def main(argv: Sequence[str]) -> int:
    """Soaks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.campaign.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1.0)
    args = parser.parse_args(argv)
    folder = args.output.absolute() / "soak"
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / f"run-{time.time_ns()}"
    config = moved(TinyRun(sections=SETTINGS).write(folder, run), folder, run)
    process = Running(write_settings(config, folder / CONFIG), folder / "printed.txt", folder / CACHE)
    samples = watch(process, args.hours, args.hours * 3600 / 2000, lambda: resident(process.pid))
    crashed = process.ended()
    process.send(15)
    done = process.wait()
    half = samples[len(samples) // 2 :]
    found = slope(*map(list, zip(*half, strict=True)))
    steps = sum('"loss"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    failed = crashed or done.status != 143 or found.low > 0
    line = {
        "date": datetime.date.today().isoformat(),
        "hours": args.hours,
        "steps": steps,
        "mib": half[-1][1] / 2**20,
        "mib_per_hour": [value / 2**20 for value in found],
        "status": done.status,
        "failed": failed,
    }
    with (args.output / "soak.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"soak: {steps:,} steps in {args.hours:g} h, {line['mib']:.0f} MiB, {found.value / 2**20:+.2f} MiB per hour "
        f"[{found.low / 2**20:+.2f}, {found.high / 2**20:+.2f}], {'failed' if failed else 'passed'}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
