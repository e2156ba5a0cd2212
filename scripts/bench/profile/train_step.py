"""Breaks one training step into parts: milliseconds on a CPU, or bytes on a GPU that need not be here.

    python -m scripts.bench.profile.train_step [--model FILE.gguf] [--batch 1] [--seq 512] [--rank 16]
        [--remat names] [--steps 4]
    python -m scripts.bench.profile.train_step --card h100 [--batch 4] [--seq 2048]

Without --card, real steps run on this CPU and are traced. The step's arithmetic is a few hundred operations ("thunks"),
which may run side by side. Columns of the first table:

  forward, backward, recomputed   milliseconds a step, median over steps: each instant is shared out evenly among the
                                  operations that run in it, so that parts add up to the time in which anything ran
  thunks                          the same operations from start to end each, summed: may exceed the wall clock
  share                           of the step's wall clock
  GFLOP, GFLOP/s                  products by formula (qlora_jax/training/cost/flops.py), and over the milliseconds

What XLA fused counts for one part, which its metadata names. The head's gradient is made in its forward pass. With
--card, the real step is compiled for that card (`bash scripts/setup_gpu_compile.sh` first) and nothing runs.
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
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from pallas_kernels.gpu_specs import CARDS
from qlora_jax import allocator, runtime
from qlora_jax.config import LoraArgs
from qlora_jax.models.decoder import REMAT_POLICIES
from qlora_jax.models.partition import ModelParts
from qlora_jax.training.cost import flops
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
from scripts.bench.profile.tables import show_times
from scripts.bench.support.real_step import hold, random_batch
from scripts.fetch_smollm2 import fetch_smollm2

MODULES = {"jit_gradients": "gradients", "jit_update": OPTIMIZER}  # as a trace calls the two programs
WIDTH = 150  # of a table where nothing says how wide the screen is
Seconds = dict[str, float]


class Run(NamedTuple):
    """A compiled step: `step()` takes one and tells each program's seconds."""

    step: Callable[[], Seconds]
    texts: dict[str, str]
    counted: flops.Step


def prepare(args: argparse.Namespace) -> Run:
    """Compiles both programs and loads the model, as workers/train_step.py does."""
    shape = (1, args.batch, args.seq)
    held = hold(str(args.model), rank=args.rank, compute_dtype=args.compute_dtype, batch=shape, remat=args.remat)
    parts, state = held.parts, held.state
    batch = random_batch(np.random.default_rng(0), held.config.vocab_size, args.batch, args.seq)
    programs = {
        "gradients": held.gradients.compiled(shape),
        OPTIMIZER: update.lower(held.optimizer, parts.lora, state, parts.lora).compile(),
    }
    runtime.give_memory_back()
    adapters = LoraArgs(rank=args.rank)
    counted = flops.Step(model=held.config, weights=held.weights, lora=adapters, batch=shape, remat=args.remat)
    texts = {name: program.as_text() for name, program in programs.items()}
    return Run(stepper(programs, parts, state, batch), texts, counted)


def stepper(programs: dict[str, Any], parts: ModelParts, state: Any, batch: Any) -> Callable[[], Seconds]:
    """Run.step, which trains `parts.lora` from step to step."""

    def step() -> Seconds:
        nonlocal parts, state
        began = time.perf_counter()
        grads, _ = jax.block_until_ready(programs["gradients"](parts, batch, None))
        between = time.perf_counter()
        lora, state, _ = jax.block_until_ready(programs[OPTIMIZER](parts.lora, state, grads))
        parts = parts.with_lora(lora)
        return {"gradients": between - began, OPTIMIZER: time.perf_counter() - between}

    return step


def traced(step: Callable[[], Seconds]) -> tuple[Seconds, list[Event]]:
    """One step's seconds by program, and the operations that ran in it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would be traced too, at a price
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            seconds = step()
        files = list(Path(folder).rglob("*.xplane.pb"))
        return seconds, list(events_of(jax.profiler.ProfileData.from_file(str(files[0]))))


def events_of(profile: jax.profiler.ProfileData) -> Iterator[Event]:
    """The operations among all that the profiler saw."""
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                told = dict(event.stats)
                if "hlo_op" in told:
                    module = MODULES.get(str(told["hlo_module"]), "")
                    yield Event(module, str(told["hlo_op"]), event.start_ns, event.start_ns + event.duration_ns)


def profile(run: Run, steps: int) -> dict[str, Any]:
    """Wall clocks in milliseconds, and `rows`: the operations."""
    run.step()  # what a first step has to set up
    plain = [run.step() for _ in range(steps)]
    seen = [traced(run.step) for _ in range(steps)]
    rows = measure([events for _, events in seen], {name: operations_of(text) for name, text in run.texts.items()})
    wall = {"untraced_ms": median_ms(plain), "traced_ms": median_ms([seconds for seconds, _ in seen])}
    busy = {"busy_ms": sum(row.ms for row in rows), "thunks_ms": sum(row.thunk_ms for row in rows)}
    return wall | busy | {"rows": rows}


def median_ms(steps: list[Seconds]) -> Seconds:
    """Of each program and of the whole step."""
    whole = [seconds | {"step": sum(seconds.values())} for seconds in steps]
    return {name: 1e3 * statistics.median(seconds[name] for seconds in whole) for name in whole[0]}


def part_rows(rows: list[Measured], counted: flops.Step, step_ms: float) -> list[dict[str, Any]]:
    """A line of the table of parts each, and a last one for the time in which nothing ran.

    Sums of medians are not the median of sums: where a step's time varies, the last line may be a little below zero.
    """
    flop, lines = flop_by_part(flops.flops(counted)), []
    for part, took in by_part(rows).items():
        by_formula = sum(flop.get(part, {}).values())
        rate = by_formula / took.ms / 1e6 if by_formula else None
        line = {"part": part, **{d: took.directions[d] for d in DIRECTIONS}, "ms": took.ms, "thunks_ms": took.thunk_ms}
        lines.append(line | {"share": took.ms / step_ms, "flop": flop.get(part, {}), "gflop_per_second": rate})
    idle = step_ms - sum(line["ms"] for line in lines)
    return [*lines, {"part": "nothing ran", "ms": idle, "share": idle / step_ms, "flop": {}}]


def operation_rows(rows: list[Measured]) -> list[dict[str, Any]]:
    """A line of the table of operations each."""
    return [
        {"ms": row.ms, "calls": row.calls, "thunks_ms": row.thunk_ms, "part": row.part, "direction": row.direction}
        | {"operation": row.operation.name, "shape": row.operation.shape, "source": short(row.operation.source)}
        for row in rows
    ]


def times(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs, shows, and returns what --json writes."""
    # A program out of the cache has the metadata of the source that it was first compiled from.
    jax.config.update("jax_enable_compilation_cache", False)
    run = prepare(args)
    told = profile(run, args.steps)
    rows = told.pop("rows")
    told |= {"parts": part_rows(rows, run.counted, told["traced_ms"]["step"]), "operations": operation_rows(rows)}
    show_times(console, told, args.top)
    return told | {"compute_dtype": run.counted.weights.dtype, "cores": os.cpu_count()}


def main() -> None:
    """Times, or with --card bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file or a Hugging Face folder; SmolLM2-135M where none is")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="names", choices=REMAT_POLICIES)
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--steps", type=int, default=4, help="traced steps")
    parser.add_argument("--top", type=int, default=15, help="operations, or temporary buffers, that are listed")
    parser.add_argument("--json", type=Path, help="a file for the same figures, of all operations")
    parser.add_argument("--card", choices=sorted(CARDS), help="bytes on this card; nothing runs")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # times are a CPU's; for a card that is absent JAX wants it as well
    args.model = args.model or fetch_smollm2()
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    told = bytes_on(args, console) if args.card else times(args, console)
    if args.json:
        settings = {name: getattr(args, name) for name in ("batch", "seq", "rank", "remat", "steps", "card")}
        args.json.write_text(json.dumps({"model": args.model.name} | settings | told, indent=1))


if __name__ == "__main__":
    # The profiler's types are of an extension module, and Python asks such for their module's name.
    warnings.filterwarnings("ignore", message="builtin type .* has no __module__ attribute")
    allocator.tune()
    main()
