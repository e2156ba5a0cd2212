"""Measures `qlora-jax serve` as its clients see it: start to the first answer, waits under load, resident memory.

    python -m scripts.bench.server [--clients 64] [--minutes 10] [--cache 256MiB]

SmolLM2-135M with two LoRA adapters of rank 16. Each client streams one chat after the other from a random model, with
prompts of 10 to 300 words and replies of up to 64 tokens. Any status but 200 and any error event ends the run.
"""

import argparse
import asyncio
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

import qlora_jax as q
from qlora_jax import runtime
from scripts.fetch_smollm2 import fetch_smollm2

WORDS = ["river", "stone", "cloud", "light", "water", "fire", "earth", "wind", "moon", "star", "tree", "seven"]
MODELS = ("base", "a", "b")
MIB = 1 << 20
START_SECONDS = 300


@dataclasses.dataclass
class Seen:
    """Holds the seconds that clients waited for a first token and between tokens, and when their replies ended."""

    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)
    ends: list[list[float]] = dataclasses.field(default_factory=list)  # per client


def main() -> None:
    """Prints one line per measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cache", default="256MiB")
    args = parser.parse_args()
    runtime.start()
    with tempfile.TemporaryDirectory() as folder:
        base, runs = _write_models(Path(folder))
        command = [sys.executable, "-m", "qlora_jax.serve", "--model", str(base), "--cache", args.cache, "--port", "0"]
        command += [word for run in runs for word in ("--run", str(run))]
        _serve(command).kill()  # fills the cache of compiled programs
        began = time.perf_counter()
        process = _serve(command)
        try:
            print(f"start to the first answer, warm: {time.perf_counter() - began:.1f} s")
            print(f"resident memory after it: {_resident(process.pid) / MIB:,.0f} MiB")
            asyncio.run(_measure(process, args.clients, 60 * args.minutes))
        finally:
            process.kill()
        files = sum(path.stat().st_size for run in runs for path in run.rglob("*"))
        print(f"files: base {base.stat().st_size / MIB:,.0f} MiB, adapters {files / MIB:,.0f} MiB")


def _write_models(folder: Path) -> tuple[Path, list[Path]]:
    base = folder / "base.gguf"
    base.symlink_to(fetch_smollm2())
    model, _ = q.load(str(base))
    for name in MODELS[1:]:
        q.save_peft(q.add_adapter(model, q.LoRA(rank=16)), folder / name)
    return base, [folder / name for name in MODELS[1:]]


class Process(subprocess.Popen[str]):
    """A server that has answered once; `url` is its address."""

    url = ""


def _serve(command: list[str]) -> Process:
    """Starts a server, and returns it with its first answer."""
    process = Process(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving "):
            break
    else:
        raise RuntimeError("the server did not start:\n" + "".join(lines))
    process.url = lines[-1].split()[-1]
    body = {"model": MODELS[0], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    httpx.post(f"{process.url}/v1/chat/completions", json=body, timeout=START_SECONDS).raise_for_status()
    return process


async def _measure(process: Process, clients: int, seconds: float) -> None:
    seen = Seen(ends=[[] for _ in range(clients)])
    began = time.perf_counter()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=process.url, timeout=START_SECONDS, limits=limits) as client:
        tasks = [_client(client, number, began + seconds, seen) for number in range(clients)]
        sizes: list[int] = []  # one per second
        sampler = asyncio.create_task(_sample(process.pid, sizes))
        await asyncio.gather(*tasks)
        sampler.cancel()
    replies = [len(ends) for ends in seen.ends]
    print(f"{clients} clients, {seconds / 60:g} minutes: {sum(replies)} replies, {min(replies)} to {max(replies)} each")
    for name, values in (("to the first token", seen.first), ("between tokens", seen.between)):
        p50, p99 = np.percentile(values, [50, 99])
        print(f"seconds {name}: p50 {p50:.3f}, p99 {p99:.3f}, longest {max(values):.3f}")
    minutes = [f"{max(sizes[at : at + 60]) / MIB:,.0f}" for at in range(0, len(sizes), 60)]
    print(f"resident memory by minute, MiB: {', '.join(minutes)}")


async def _sample(pid: int, sizes: list[int]) -> None:
    while True:
        sizes.append(_resident(pid))
        await asyncio.sleep(1)


async def _client(client: httpx.AsyncClient, number: int, until: float, seen: Seen) -> None:
    draw = random.Random(number)
    while time.perf_counter() < until:
        words = " ".join(draw.choices(WORDS, k=draw.randint(10, 300)))
        body = {
            "model": draw.choice(MODELS),
            "messages": [{"role": "user", "content": f"{number} {words}"}],
            "max_tokens": draw.randint(1, 64),
            "stream": True,
        }
        last, count = time.perf_counter(), 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError(f"status {reply.status_code}: {(await reply.aread())[:500]!r}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(line)
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    now = time.perf_counter()
                    (seen.between if count else seen.first).append(now - last)
                    last, count = now, count + 1
        seen.ends[number].append(time.perf_counter())


def _resident(pid: int) -> int:
    """Returns the resident bytes of a process and its descendants."""
    proc = Path("/proc") / str(pid)
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    children = (proc / "task" / str(pid) / "children").read_text().split()
    return int(fields["VmRSS"].split()[0]) * 1024 + sum(map(_resident, map(int, children)))


if __name__ == "__main__":
    main()
