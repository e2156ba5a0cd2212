"""Measures fused products, attention and training steps of 8B on this GPU, next to cuBLAS and cuDNN.

    JAX_PLATFORMS=cuda python -m scripts.bench.gpu.run --output runs/bench_gpu.json
    JAX_PLATFORMS=cpu python -m scripts.bench.gpu.run --rehearse

Steps come first, each in a separate process, then attention. Then come products, shape by shape, until --seconds have
passed; the end of the output lists skipped ones. The output file is rewritten after each. The end also has the M from
which on the fused kernel loses (MOST_ROWS of mosaic/capabilities.py), the fastest tile of each product
(hopper.best_tile, ampere.tile_for), and the goals.

--rehearse runs everything on a CPU, to find mistakes before using time on a card: tiny shapes, interpreted kernels,
meaningless numbers. The kernels of a training step are not interpreted, because callbacks cannot be rematerialized.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import Device, target_device
from pallas_kernels.gpu_specs import CARDS, Card, find_card
from pallas_kernels.mosaic import installation
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape
from scripts.bench.gpu import attention, tables
from scripts.bench.gpu.matmuls import Bench, Record, measure
from scripts.bench.support.progress import phase, phases

STEP_TIMEOUT_S = 120
UNFILTERED = {"JAX_TRACEBACK_FILTERING": "off"}  # otherwise the last lines of an error do not show its cause
TRACED = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="}  # see train_step
STEPS = ((2048, "full"), (2048, "names"), (2048, "none"), (512, "names"), (8192, "attention"))  # (tokens, remat)
ROWS = (1, 16, 2048, 4096, 8192, 512, 128, 1024)  # the goals and the crossover come first
PATTERNS = ("llama-3-8b/*", "llama-3-70b/gate,up", "llama-2-7b/down")
TINY_ROWS, TINY = (1, 24), Shape("tiny", "square", 256, 256, 1, 1)
SHARE = 10  # weights may take 1 / SHARE of a card's memory, and so may results


def run_steps(rehearse: bool) -> list[Record]:
    """Returns one record per length and remat policy, and a traced one: its step, or its failure."""
    records = []
    for length, remat, *trace in phases("training step of", (*STEPS, (*STEPS[1], "--trace"))):
        command = [sys.executable, "-m", "scripts.bench.gpu.train_step", "--length", str(length), "--remat", remat]
        command += [*trace, *(["--rehearse"] if rehearse else [])]
        how = os.environ | UNFILTERED | (TRACED if trace and not rehearse else {})
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, env=how)
            failed = done.returncode != 0
            record = {"failure": done.stderr.strip()[-600:]} if failed else json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            record = {"failure": f"no result within {STEP_TIMEOUT_S} s"}
        records.append({"length": length, "remat": remat, **record})
    return records


def card_of(device: Device, name: str | None) -> Card:
    """Returns the named card, else the card of the device, else one with its compute capability, else an h100.

    A guess affects only the peaks that shares refer to, and the output names it.
    """
    if name is not None:
        return find_card(name)
    cards = CARDS.values()
    exact = [card for card in cards if card.description == device.kind]
    similar = [card for card in cards if card.compute_capability == device.compute_capability]
    return [*exact, *similar, CARDS["h100"]][0]


def bench_of(device: Device, card: Card, rehearse: bool) -> Bench:
    """Returns the parameters of the measurement on the card, or of the rehearsal."""
    return Bench(
        device=device,
        interpret=plgpu.InterpretGPUParams() if rehearse else None,
        peak=card.bf16_flops,
        bandwidth=card.bandwidth,
        memory=2**18 if rehearse else card.memory_bytes // SHARE,
        warm_up=1 if rehearse else 3,
        samples=1 if rehearse else 10,
    )


def shapes_of(patterns: Sequence[str]) -> list[Shape]:
    """Returns the shapes that match the patterns, in their order, each size once.

    Raises:
      ValueError: no shape matches.
    """
    named = [shape for pattern in patterns for name, shape in SHAPES.items() if fnmatch.fnmatchcase(name, pattern)]
    if not named:
        raise ValueError(f"--shape: no shape matches {patterns}. Use names or patterns of: {', '.join(SHAPES)}.")
    return list({shape.nk: shape for shape in named}.values())


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--seconds", type=float, default=330.0, help="start no product after this time")
    parser.add_argument("--shape", nargs="+", default=list(PATTERNS), help="names or patterns of shapes")
    parser.add_argument("--card", choices=CARDS, help="card whose peaks shares refer to (default: the device's)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes and interpreted kernels")
    return parser.parse_args()


def main() -> int:
    """Measures steps and products and prints tables; returns 1 if anything failed."""
    args, began = arguments(), time.perf_counter()
    shapes, rows = ([TINY], TINY_ROWS) if args.rehearse else (shapes_of(args.shape), ROWS)
    steps = run_steps(args.rehearse)  # before jax takes the card, because a step needs all of it
    device = target_device()
    if not args.rehearse and device.platform != "gpu":
        raise SystemExit(
            f"bench.gpu.run: no GPU (jax uses {device}). Set JAX_PLATFORMS=cuda on a card, or pass --rehearse."
        )
    card = card_of(device, args.card)
    result = about(device, card) | {"rehearsed": args.rehearse, "steps": steps, "products": [], "left out": []}
    print("\n".join([", ".join(f"{k} {v}" for k, v in about(device, card).items()), *_step_lines(result, card)]))
    bench = bench_of(device, card, args.rehearse)
    records = []
    for case in phases("attention of", attention.TINY if args.rehearse else attention.CASES):
        records.append(attention.measure(bench.device, case, bench.warm_up, bench.samples))
        print("\n".join(attention.lines(records[-1])), flush=True)
    result["attention"] = records
    for m, shape in ((m, shape) for m in rows for shape in shapes):
        if time.perf_counter() - began > args.seconds:
            result["left out"].append(f"{shape.name} M={m}")
        else:
            phase(f"product {shape.name} of {m} rows")
            result["products"].append(measure(bench_of(device, card, args.rehearse), shape, m))
            print("\n".join(tables.product_line(result["products"][-1])), flush=True)
        _write(args.output, result)
    products, steps, left_out = (result[part] for part in ("products", "steps", "left out"))
    lines = [*tables.crossover_rows(products), *tables.tile_rows(products), *_step_lines(result, card)]
    lines += tables.goals(products, steps, card.bf16_flops, card.bandwidth)
    lines += [f"skipped, out of time: {', '.join(left_out)}"] if left_out else []
    print("\n".join(["", *lines]), flush=True)
    return int(_has_failures(result))


def about(device: Device, card: Card) -> Record:
    """Returns the device, the card of the peaks, and versions."""
    cuda = installation.cuda_versions() if device.platform == "gpu" else None
    versions = {"jax": jax.__version__, "cuda of driver and runtime": cuda}
    return {"device": str(device), "shares of the peaks of": card.description, **versions}


def _step_lines(result: Record, card: Card) -> list[str]:
    return [line for step in result["steps"] for line in tables.step_lines(step, card.bf16_flops)]


def _write(path: Path | None, result: Record) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))


def _has_failures(result: Record) -> bool:
    ways = [record[way] for record in result["products"] for way in ("forward", "backward")]
    ways += result["attention"]
    return any("failure" in step for step in result["steps"]) or any(way["failures"] for way in ways)


if __name__ == "__main__":
    sys.exit(main())
