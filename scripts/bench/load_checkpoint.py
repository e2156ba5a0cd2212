"""Measures loading of a large sharded checkpoint, compared with reading and quantizing, and its memory.

    python -m scripts.bench.load_checkpoint [--model llama-7b] [--layers N] [--folder PLACE] [--blocks 3]

The checkpoint has the shapes of a published model in bf16 with random weights, in shards of 5 GB, and is removed at the
end. Each block measures three jobs, each in a separate process with the files dropped from the system's cache: reading
all bytes; quantizing as many weights of those shapes from memory; and loading (read, quantize to NF4 with double
quantization, stack). The last line is JSON: median seconds; loading time over the slower of the other two, the median
of blocks; and the peak resident memory of loading, beyond the process before it and the model itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from qlora_jax import runtime
from qlora_jax.io.hf.model_writer import SHARD, TensorSpec, shard_index, split_into_shards, write_safetensors
from qlora_jax.io.hf.reader import INDEX
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.models.catalog import PUBLISHED
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.quant import quantize
from scripts.bench.plan_memory import reset_peak, resident
from scripts.bench.support.progress import phase, phases

BF16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 24  # bytes read in one go
WORK = ("read", "quantize", "load")


def make(folder: Path, name: str, layers: int | None) -> None:
    """Writes the checkpoint, with one tensor in memory at a time."""
    config = {**PUBLISHED[name]} | ({} if layers is None else {"num_hidden_layers": layers})
    phase("writing the checkpoint")
    features = model_config(config)
    weights = WeightFormat(quant_type=None, dtype=BF16.name)
    slots = slots_of(nnx.eval_shape(lambda: CausalLM(features, weights)))
    shards = split_into_shards([TensorSpec(tensor, BF16, slot.shape) for slot in slots for tensor in slot.names])
    names = [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 26, np.float32) * 0.02).astype(BF16)  # each tensor gets another part
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, (cut(noise, tensor.shape, rng) for tensor in shard))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps(shard_index(dict(zip(names, shards, strict=True)))))


def cut(noise: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Returns weights of a shape, from a random position of the noise."""
    return np.resize(np.roll(noise, int(rng.integers(noise.size))), shape)


def drop_from_cache(folder: Path) -> None:
    """Drops the files from the system's cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> dict[str, float]:
    """Reads all bytes in order."""
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - began}


def quantize_alone(folder: Path) -> dict[str, float]:
    """Quantizes each shape of a linear layer from memory, and multiplies its time by the number of such layers."""
    source = open_model(folder)
    counted: dict[tuple[int, ...], int] = {}
    for name, entry in source.tensors.items():
        if ".layers." in name and len(entry.shape) == 2:
            counted[entry.shape] = counted.get(entry.shape, 0) + 1
    rng, total = np.random.default_rng(0), 0.0
    for shape, count in counted.items():
        weight = (rng.standard_normal(shape, np.float32) * 0.02).astype(BF16)
        jax.block_until_ready(quantize(weight))
        times = [timed(weight) for _ in range(5)]
        total += count * statistics.median(times)
    return {"seconds": total}


def timed(weight: np.ndarray) -> float:
    """Returns the seconds of one quantization."""
    began = time.perf_counter()
    jax.block_until_ready(quantize(weight))
    return time.perf_counter() - began


def load(folder: Path) -> dict[str, float]:
    """Loads the model as training does; returns seconds and bytes."""
    source = open_model(folder)
    features = model_config(source.config)
    before = resident("VmRSS")
    reset_peak()
    began = time.perf_counter()
    loaded = load_model(source, features, WeightFormat())
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(loaded.model)))
    seconds = time.perf_counter() - began
    model = sum(leaf.nbytes for leaf in leaves)
    largest = max(4 * int(np.prod(entry.shape)) for entry in source.tensors.values())
    beyond = resident("VmHWM") - before - model
    return {"seconds": seconds, "model_bytes": model, "beyond_model_bytes": beyond, "largest_f32_bytes": largest}


def run_in_process(work: str, folder: Path) -> dict[str, float]:
    """Returns the result of one job of WORK, run in a new process with the files dropped from the cache."""
    drop_from_cache(folder)
    command = [sys.executable, "-m", "scripts.bench.load_checkpoint", "--work", work, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measured(folder: Path, blocks: int) -> Iterator[dict[str, dict[str, float]]]:
    """Yields the results of each block."""
    for _ in phases("block", range(blocks)):
        yield {work: run_in_process(work, folder) for work in phases("measuring", WORK)}


def summary(folder: Path, records: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Returns medians over the blocks."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds = {f"{work}_s": statistics.median(record[work]["seconds"] for record in records) for work in WORK}
    ratios = [r["load"]["seconds"] / max(r["read"]["seconds"], r["quantize"]["seconds"]) for r in records]
    memory = {name: value for name, value in records[-1]["load"].items() if name != "seconds"}
    peak = max(record["load"]["beyond_model_bytes"] for record in records)
    return {
        "bytes": size,
        **seconds,
        "load_over_slower": statistics.median(ratios),
        **memory,
        "beyond_model_bytes": peak,
    }


def main() -> None:
    """Writes the checkpoint and measures; with --work, does one job of WORK."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PUBLISHED, default="llama-7b")
    parser.add_argument("--layers", type=int, help="write fewer layers than the model has")
    parser.add_argument("--folder", type=Path, help="where to write it (default: the system's temporary folder)")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runtime.start()
    if args.work:
        print(json.dumps({"read": read, "quantize": quantize_alone, "load": load}[args.work](args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as parent:
        folder = Path(parent)
        make(folder, args.model, args.layers)
        print(json.dumps({"model": args.model, **summary(folder, list(measured(folder, args.blocks)))}))


if __name__ == "__main__":
    main()
