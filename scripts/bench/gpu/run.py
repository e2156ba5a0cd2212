"""The fused kernels' speed on this GPU, beside dequantize + cuBLAS and bf16 cuBLAS, and that of a training step of 8B.

    JAX_PLATFORMS=cuda python -m scripts.bench.gpu.run --output runs/bench_gpu.json
    JAX_PLATFORMS=cpu python -m scripts.bench.gpu.run --rehearse

Steps come first, each in a process of its own; then products, shape by shape, until --seconds are over (what was left
out is said). The file is written anew after each. At the end: from which M on fused loses (MOST_ROWS of
mosaic/abilities.py), the fastest tile of each product (hopper.best_tile, ampere.tile_for), and the goals.

--rehearse runs all of it on a CPU, so that no minute of a card is lost to a slip: tiny shapes, the kernels' interpreted
twins, numbers that mean nothing. A step's kernels are not interpreted: callbacks can't be rematerialized.
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
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import Device, target_device
from pallas_kernels.gpu_specs import CARDS, Card, find_card
from pallas_kernels.nf4_matmul.mosaic import installation
from pallas_kernels.nf4_matmul.shapes import SHAPES, Shape
from scripts.bench.gpu import tables
from scripts.bench.gpu.matmuls import Bench, measure

STEP_TIMEOUT_S = 120
UNFILTERED = {"JAX_TRACEBACK_FILTERING": "off"}  # else an error's last lines are not what went wrong
POLICIES = ("full", "names", "none")  # most that is computed again first: the least memory
ROWS = (1, 16, 2048, 4096, 8192, 512, 128, 1024)  # what the goals name and the crossover wants before what refines it
PATTERNS = ("llama-3-8b/*", "llama-3-70b/gate,up", "llama-2-7b/down")
TINY_ROWS, TINY = (1, 24), Shape("tiny", "square", 256, 256, 1, 1)
SHARE = 10  # of a card's memory: what weights, and what results, may take


def run_steps(rehearse: bool) -> list[dict[str, Any]]:
    """A record of each policy's step, or what went wrong."""
    records = []
    for remat in POLICIES:
        command = [sys.executable, "-m", "scripts.bench.gpu.train_step", "--remat", remat]
        command += ["--rehearse"] if rehearse else []
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, env=os.environ | UNFILTERED
            )
            failed = done.returncode != 0
            record = {"failure": done.stderr.strip()[-600:]} if failed else json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            record = {"failure": f"not done within {STEP_TIMEOUT_S} s"}
        records.append({"remat": remat, **record})
    return records


def card_of(device: Device, name: str | None) -> Card:
    """The card of that name; without one, the card that the device is, or one of its compute capability, or an h100.

    A guess is better than no benchmark: it sets only what shares are of, and the output names it.
    """
    if name is not None:
        return find_card(name)
    cards = CARDS.values()
    same = [card for card in cards if card.description == device.kind]
    alike = [card for card in cards if card.compute_capability == device.compute_capability]
    return [*same, *alike, CARDS["h100"]][0]


def bench_of(device: Device, card: Card, rehearse: bool) -> Bench:
    """How products are measured on the card, or rehearsed."""
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
    """The named shapes, in the patterns' order, each size once."""
    named = [shape for pattern in patterns for name, shape in SHAPES.items() if fnmatch.fnmatchcase(name, pattern)]
    if not named:
        raise ValueError(f"{patterns} match none of: {', '.join(SHAPES)}")
    return list({shape.nk: shape for shape in named}.values())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--seconds", type=float, default=400.0, help="after which no further product is begun")
    parser.add_argument("--shape", nargs="+", default=list(PATTERNS), help="names or patterns of shapes")
    parser.add_argument("--card", choices=CARDS, help="whose peaks shares are of; default: as jax names it")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny and interpreted")
    return parser.parse_args()


def main() -> int:
    """Steps, products, tables; 1 where anything failed."""
    args, began = arguments(), time.perf_counter()
    shapes, rows = ([TINY], TINY_ROWS) if args.rehearse else (shapes_of(args.shape), ROWS)
    steps = run_steps(args.rehearse)  # before jax takes the card: a step's process wants it whole
    device = target_device()
    if not args.rehearse and device.platform != "gpu":
        raise SystemExit(f"bench_gpu: jax computes on {device}; on a card set JAX_PLATFORMS=cuda, else --rehearse")
    card = card_of(device, args.card)
    result = about(device, card) | {"rehearsed": args.rehearse, "steps": steps, "products": [], "left out": []}
    print("\n".join([", ".join(f"{k} {v}" for k, v in about(device, card).items()), *_step_lines(result, card)]))
    for m, shape in ((m, shape) for m in rows for shape in shapes):
        if time.perf_counter() - began > args.seconds:
            result["left out"].append(f"{shape.name} M={m}")
        else:
            result["products"].append(measure(bench_of(device, card, args.rehearse), shape, m))
            print("\n".join(tables.product_line(result["products"][-1])), flush=True)
        _write(args.output, result)
    _summary(result, card)
    return int(_has_failures(result))


def about(device: Device, card: Card) -> dict[str, Any]:
    """What was measured on."""
    cuda = installation.cuda_versions() if device.platform == "gpu" else None
    versions = {"jax": jax.__version__, "cuda of driver and runtime": cuda}
    return {"device": str(device), "shares of the peaks of": card.description, **versions}


def _step_lines(result: dict[str, Any], card: Card) -> list[str]:
    return [tables.step_line(step, card.bf16_flops) for step in result["steps"]]


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))


def _summary(result: dict[str, Any], card: Card) -> None:
    products, steps, left_out = (result[part] for part in ("products", "steps", "left out"))
    lines = [*tables.crossover_rows(products), *tables.tile_rows(products), *_step_lines(result, card)]
    lines += tables.goals(products, steps, card.bf16_flops, card.bandwidth)
    lines += [f"not measured, for time: {', '.join(left_out)}"] if left_out else []
    print("\n".join(["", *lines]), flush=True)


def _has_failures(result: dict[str, Any]) -> bool:
    ways = [record[way] for record in result["products"] for way in ("forward", "backward")]
    return any("failure" in step for step in result["steps"]) or any(way["failures"] for way in ways)


if __name__ == "__main__":
    sys.exit(main())
