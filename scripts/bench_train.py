"""Training speed, memory and time to the first step: ours against PyTorch + PEFT + bitsandbytes, in one run.

    python scripts/bench_train.py [--batch 1 4] [--blocks 4] [--opponent-args="--no-compile"]

Both load SmolLM2-135M-Instruct, hold it in NF4 with double quantization, and train LoRA of rank 16 on all linear layers
on rows of 512 tokens. The two processes stay alive and take turns, a block of steps each, so that a machine whose speed
drifts slows both. The first step of a block is not counted: after a pause a step of either takes longer, which no
training run sees. The ratio is the median over the ratios of neighbouring blocks. The opponent runs in the oracle
environment (scripts/setup_oracle.sh). A table for people, then one JSON line.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fetch_smollm2 import fetch_smollm2

ROOT = Path(__file__).resolve().parent.parent
ORACLE = Path(os.environ.get("QLORA_ORACLE_PYTHON", ROOT / ".oracle/bin/python"))
BLOCK = 4  # counted steps of a block


class Player:
    """A process that does a training step each time it is asked, and tells how long it took."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._started = time.perf_counter()
        self._process = subprocess.Popen(command, text=True, env=os.environ | environment, **pipes)

    def turn(self, steps: int) -> list[dict[str, Any]]:
        """The records of so many steps; the process is stopped between its turns: its idle threads take no time."""
        self._process.send_signal(signal.SIGCONT)
        records = [self._step() for _ in range(steps)]
        self._process.send_signal(signal.SIGSTOP)
        return records

    def _step(self) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line) | {"since_start_s": time.perf_counter() - self._started}
        status, _ = self._process.wait(), self._errors.seek(0)
        raise RuntimeError(f"{self._process.args} ended with status {status}:\n{self._errors.read()[-3000:]}")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def duel(ours: list[str], theirs: list[str], cache: str, blocks: int) -> dict[str, Any]:
    """Blocks in turn; both start one after the other, so that neither's start-up slows the other's."""
    players: dict[str, Player] = {}
    firsts, turns = {}, {"ours": [], "theirs": []}
    for name, command in (("ours", ours), ("theirs", theirs)):
        players[name] = Player(command, {"QLORA_JAX_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"})
        firsts[name] = players[name].turn(1)[0]
    for _ in range(blocks):
        for name, player in players.items():
            turns[name].append(player.turn(1 + BLOCK)[1:])
    for player in players.values():
        player.close()
    medians = {name: [statistics.median(r["seconds"] for r in turn) for turn in turns[name]] for name in players}
    return {
        **{name: _summary(firsts[name], turns[name]) for name in players},
        "speed_ratio": statistics.median(b / a for a, b in zip(medians["ours"], medians["theirs"], strict=True)),
        "memory_ratio": turns["ours"][-1][-1]["peak_rss_mib"] / turns["theirs"][-1][-1]["peak_rss_mib"],
        "blocks": blocks,
    }


def _summary(first: dict[str, Any], turns: list[list[dict[str, Any]]]) -> dict[str, float]:
    steps = [record for turn in turns for record in turn]
    return {
        "step_s": statistics.median(record["seconds"] for record in steps),
        "peak_rss_mib": steps[-1]["peak_rss_mib"],
        "to_first_step_s": first["since_start_s"],
        "loss": steps[-1]["loss"],
    }


def main() -> None:
    """Each batch size: a duel, with a cold and then a warm compilation cache of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--blocks", type=int, default=4, help=f"turns of each, of {BLOCK} counted steps")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="names", choices=["none", "names", "full"])
    parser.add_argument("--opponent-args", default="", help="further arguments of opponents/torch_qlora_cpu.py")
    args = parser.parse_args()
    gguf = str(fetch_smollm2())
    results = []
    for batch in args.batch:
        shape = ["--batch", str(batch), "--seq", str(args.seq), "--rank", str(args.rank)]
        ours = [sys.executable, str(ROOT / "scripts/bench_step.py"), "--gguf", gguf, *shape, "--remat", args.remat]
        theirs = [str(ORACLE), str(ROOT / "scripts/opponents/torch_qlora_cpu.py"), "--gguf", gguf, *shape, "--in-turns"]
        with tempfile.TemporaryDirectory() as cache:
            result = duel(ours, [*theirs, *args.opponent_args.split()], cache, args.blocks)
            warm = Player(ours, {"QLORA_JAX_CACHE": cache})
            result["ours"]["to_first_step_warm_s"] = warm.turn(1)[0]["since_start_s"]
            warm.close()
        results.append({"batch": batch, "seq": args.seq, "rank": args.rank, "remat": args.remat} | result)
        _show(results[-1], args.seq)
    print(json.dumps(results))


def _show(result: dict[str, Any], seq: int) -> None:
    tokens = result["batch"] * seq
    print(f"batch {result['batch']}, {seq} tokens, rank {result['rank']}, remat {result['remat']}")
    for name in ("ours", "theirs"):
        row = result[name]
        warm = f", warm cache {row['to_first_step_warm_s']:.1f} s" if "to_first_step_warm_s" in row else ""
        print(f"  {name:<7} {row['step_s']:.3f} s a step, {tokens / row['step_s']:.0f} tokens/s, ", end="")
        print(f"peak {row['peak_rss_mib']:.0f} MiB, loss {row['loss']:.3f}, ", end="")
        print(f"first step done after {row['to_first_step_s']:.1f} s{warm}")
    print(f"  speed {result['speed_ratio']:.2f}x, memory {result['memory_ratio']:.2f}x", flush=True)


if __name__ == "__main__":
    main()
