"""Profiles one training step by part: milliseconds on a CPU, or bytes on a GPU that need not be present.

    python -m scripts.bench.profile.train_step [--model FILE.gguf] [--batch 1] [--seq 512] [--rank 16]
        [--remat names] [--steps 4]
    python -m scripts.bench.profile.train_step --card h100 [--batch 4] [--seq 2048]

Without --card, real steps run on this CPU and are traced. A step has a few hundred operations ("thunks"), which may run
in parallel. Columns of the first table:

  forward, backward, recomputed   milliseconds per step, median over steps: each instant is shared evenly among the
                                  running operations, so that parts add up to the time in which any operation ran
  thunks                          the same operations from start to end, summed: may exceed the wall-clock time
  share                           share of the step's wall-clock time
  GFLOP, GFLOP/s                  products by formula (qlora_jax/training/cost/flops.py), and their rate

A fusion counts for one part, which its metadata names. The head's gradient is computed in its forward pass. With
--card, the real step is compiled for that card (run `bash scripts/setup_gpu_compile.sh` first) and nothing runs.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console

from pallas_kernels.gpu_specs import CARDS
from qlora_jax import allocator, runtime
from qlora_jax.config import LoraArgs
from qlora_jax.models.partition import ModelParts
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.training.cost import flops
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.step import update
from scripts.bench.profile.card import bytes_on
from scripts.bench.profile.parts import (
    DIRECTIONS,
    OPTIMIZER,
    Event,
    Measured,
    by_part,
    flop_by_part,
    measure,
    operations_of,
    short,
)
from scripts.bench.profile.tables import Row, show_times
from scripts.bench.support.progress import phase
from scripts.bench.support.real_step import load_step, random_batch
from scripts.fetch_smollm2 import fetch_smollm2

MODULES = {"jit_gradients": "gradients", "jit_update": OPTIMIZER}  # names of the two programs in a trace
WIDTH = 150  # columns of a table, unless a terminal prints it
Seconds = dict[str, float]


class Run(NamedTuple):
    """A compiled step: `step()` takes one step and returns each program's seconds."""

    step: Callable[[], Seconds]
    texts: dict[str, str]
    counted: StepShape


def prepare(args: argparse.Namespace) -> Run:
    """Compiles both programs and loads the model, like workers/train_step.py."""
    shape = (1, args.batch, args.seq)
    loaded = load_step(str(args.model), rank=args.rank, compute_dtype=args.compute_dtype, batch=shape, remat=args.remat)
    parts, state = loaded.parts, loaded.state
    batch = random_batch(np.random.default_rng(0), loaded.config.vocab_size, args.batch, args.seq)
    programs = {
        "gradients": loaded.gradients.compiled(shape),
        OPTIMIZER: update.lower(loaded.optimizer, parts.lora, state, parts.lora).compile(),
    }
    runtime.give_memory_back()
    adapters = LoraArgs(rank=args.rank)
    counted = StepShape(model=loaded.config, weights=loaded.weights, lora=adapters, batch=shape, remat=args.remat)
    texts = {name: program.as_text() or "" for name, program in programs.items()}
    return Run(stepper(programs, parts, state, batch), texts, counted)


def stepper(
    programs: dict[str, jax.stages.Compiled],
    parts: ModelParts,
    state: optax.OptState,
    batch: dict[str, np.ndarray],
) -> Callable[[], Seconds]:
    """Returns a function that trains `parts.lora` by one step and returns seconds per program."""

    def step() -> Seconds:
        nonlocal parts, state
        began = time.perf_counter()
        grads, _ = jax.block_until_ready(programs["gradients"](parts, batch, None, None))
        between = time.perf_counter()
        lora, state, _ = jax.block_until_ready(programs[OPTIMIZER](parts.lora, state, grads))
        parts = parts.with_lora(lora)
        return {"gradients": between - began, OPTIMIZER: time.perf_counter() - between}

    return step


def traced(step: Callable[[], Seconds]) -> tuple[Seconds, list[Event]]:
    """Returns one step's seconds by program, and the operations that ran in it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing calls of Python functions would slow the step
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            seconds = step()
        files = list(Path(folder).rglob("*.xplane.pb"))
        return seconds, list(events_of(jax.profiler.ProfileData.from_file(str(files[0]))))


def events_of(profile: "jax.profiler.ProfileData") -> Iterator[Event]:  # pyright: ignore[reportInvalidTypeForm]
    """Yields the operations among all events of the profiler."""
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    module = MODULES.get(str(stats["hlo_module"]).partition("(")[0], "")  # GPUs append a number
                    yield Event(module, str(stats["hlo_op"]), event.start_ns, event.start_ns + event.duration_ns)


def profile(run: Run, steps: int) -> Row:
    """Returns wall-clock milliseconds, and the operations as `rows`."""
    phase(f"taking {2 * steps + 1} steps")
    run.step()  # includes one-time set-up
    plain = [run.step() for _ in range(steps)]
    seen = [traced(run.step) for _ in range(steps)]
    rows = measure([events for _, events in seen], {name: operations_of(text) for name, text in run.texts.items()})
    wall = {"untraced_ms": median_ms(plain), "traced_ms": median_ms([seconds for seconds, _ in seen])}
    busy = {"busy_ms": sum(row.ms for row in rows), "thunks_ms": sum(row.thunk_ms for row in rows)}
    return wall | busy | {"rows": rows}


def median_ms(steps: list[Seconds]) -> Seconds:
    """Returns the median milliseconds of each program and of the whole step."""
    whole = [seconds | {"step": sum(seconds.values())} for seconds in steps]
    return {name: 1e3 * statistics.median(seconds[name] for seconds in whole) for name in whole[0]}


def part_rows(rows: list[Measured], counted: StepShape, step_ms: float) -> list[Row]:
    """Returns one row per part, and a last one for the time in which nothing ran.

    Sums of medians are not the median of sums: if the time of steps varies, the last row may be slightly negative.
    """
    flop, lines = flop_by_part(flops.flops(counted)), []
    for part, took in by_part(rows).items():
        by_formula = sum(flop.get(part, {}).values())
        rate = by_formula / took.ms / 1e6 if by_formula else None
        line = {"part": part, **{d: took.directions[d] for d in DIRECTIONS}, "ms": took.ms, "thunks_ms": took.thunk_ms}
        lines.append(line | {"share": took.ms / step_ms, "flop": flop.get(part, {}), "gflop_per_second": rate})
    idle = step_ms - sum(line["ms"] for line in lines)
    return [*lines, {"part": "nothing ran", "ms": idle, "share": idle / step_ms, "flop": {}}]


def operation_rows(rows: list[Measured]) -> list[Row]:
    """Returns one row per operation."""
    return [
        {"ms": row.ms, "calls": row.calls, "thunks_ms": row.thunk_ms, "part": row.part, "direction": row.direction}
        | {"operation": row.operation.name, "shape": row.operation.shape, "source": short(row.operation.source)}
        for row in rows
    ]


def times(args: argparse.Namespace, console: Console) -> Row:
    """Runs the step, prints, and returns the contents of --json."""
    # A cached program has the metadata of the source from which it was first compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    run = prepare(args)
    found = profile(run, args.steps)
    rows = found.pop("rows")
    found |= {"parts": part_rows(rows, run.counted, found["traced_ms"]["step"]), "operations": operation_rows(rows)}
    show_times(console, found, args.top)
    return found | {"compute_dtype": run.counted.weights.dtype, "cores": os.cpu_count()}


def main() -> None:
    """Prints times, or bytes with --card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder (default: SmolLM2-135M)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="names", choices=REMAT_POLICIES)
    parser.add_argument("--compute_dtype", default="auto")
    parser.add_argument("--steps", type=int, default=4, help="number of traced steps")
    parser.add_argument("--top", type=int, default=15, help="number of listed operations or temporary buffers")
    parser.add_argument("--json", type=Path, help="a file for the figures of all operations")
    parser.add_argument("--card", choices=sorted(CARDS), help="compute bytes on this card; nothing runs")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # times are those of a CPU; compiling for an absent card needs it too
    args.model = args.model or fetch_smollm2()
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    found = bytes_on(args, console) if args.card else times(args, console)
    if args.json:
        settings = {name: getattr(args, name) for name in ("batch", "seq", "rank", "remat", "steps", "card")}
        args.json.write_text(json.dumps({"model": args.model.name} | settings | found, indent=1))


if __name__ == "__main__":
    # The profiler's types come from an extension module that does not set their module's name.
    warnings.filterwarnings("ignore", message="builtin type .* has no __module__ attribute")
    allocator.tune()
    main()
