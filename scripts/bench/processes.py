"""Measures how one, two and four processes over loopback start and load a model.

    python -m scripts.bench.processes [--model llama-7b] [--layers 4] [--processes 1 2 4]

All runs have four virtual CPU devices, 1 x 4. The checkpoint has the shapes of a published model in bf16 with random
weights, as in scripts/bench/load_checkpoint.py, and is removed at the end. Each process joins the others, then loads
its parts as training does. Prints one line per number of processes: seconds from the first start until all have joined,
seconds of loading, bytes of tensors read by each process, and the peak resident memory of loading, beyond the process
before it and its own parts of the model.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
from flax import nnx

from qlora_jax import runtime
from qlora_jax.hosts.join import joined
from qlora_jax.hosts.launchers import Place
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.sharding import make_mesh
from scripts.bench.load_checkpoint import drop_from_cache, make
from scripts.bench.plan_memory import reset_peak, resident
from scripts.bench.support.progress import phases

DEVICES = 4  # in all processes together
MIB = 2**20


def free_port() -> int:
    """Returns a port at which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def bytes_read() -> int:
    """Returns the bytes that this process has had the system read from files, mapped ones included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def load(folder: Path) -> dict[str, float]:
    """Loads this process's parts; returns seconds and bytes."""
    source = open_model(folder)
    features = model_config(source.config)
    before, read_before = resident("VmRSS"), bytes_read()
    reset_peak()
    began = time.perf_counter()
    mesh = make_mesh(1, DEVICES, jax.devices())
    model = load_model(source, features, WeightFormat(), mesh=mesh).model
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    seconds = time.perf_counter() - began
    own = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    largest = max(entry.shape[0] * entry.shape[1] for entry in source.tensors.values() if len(entry.shape) == 2)
    beyond = resident("VmHWM") - before - own
    return {
        "load_s": seconds,
        "own_mib": own / MIB,
        "beyond_mib": beyond / MIB,
        "largest_tensor_f32_mib": 4 * largest / MIB,
        "read_mib": (bytes_read() - read_before) / MIB,
    }


def work(folder: Path, process: int, processes: int, port: int) -> None:
    """Joins the other processes, loads, and prints the record of this process."""
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    place = Place(f"127.0.0.1:{port}", processes, process) if processes > 1 else None
    options = {"run": folder.parent / "run", "devices": None, "heartbeat": 30}
    with joined(place, **options, report=lambda error: print(error, file=sys.stderr)) as watchdog:
        watchdog.group.barrier("joined", 60)
        joined_at = time.time()
        print(json.dumps({"joined_at": joined_at, **load(folder)}), flush=True)


def measure(folder: Path, processes: int) -> list[dict[str, float]]:
    """Returns the record of each process, whose files have been dropped from the system's cache."""
    drop_from_cache(folder)
    port, began = free_port(), time.time()
    command = [sys.executable, "-m", "scripts.bench.processes", "--folder", str(folder), "--processes", str(processes)]
    started = [
        subprocess.Popen([*command, "--port", str(port), "--process", str(index)], stdout=subprocess.PIPE, text=True)
        for index in range(processes)
    ]
    records = [json.loads(each.communicate()[0].splitlines()[-1]) for each in started]
    return [{"start_s": record["joined_at"] - began, **record} for record in records]


def line(processes: int, records: list[dict[str, float]]) -> str:
    """Returns the line of the table; of each figure the largest over the processes."""
    most = {name: max(record[name] for record in records) for name in records[0] if name != "joined_at"}
    return f"{processes:>9}   " + "   ".join(f"{name} {value:9.1f}" for name, value in most.items())


def main() -> None:
    """Writes the checkpoint and measures; with --process, is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write it (default: the system's temporary folder)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    runtime.start()
    if args.process is not None:
        work(args.folder, args.process, args.processes[0], args.port)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as parent:
        folder = Path(parent) / "model"
        folder.mkdir()
        make(folder, args.model, args.layers)
        for processes in phases("processes:", args.processes):
            print(line(processes, measure(folder, processes)), flush=True)


if __name__ == "__main__":
    main()
