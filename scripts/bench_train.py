"""Training speed, memory and time to the first step: ours against PyTorch + PEFT + bitsandbytes, in one run.

    python scripts/bench_train.py [--batch 1 4] [--steps 8] [--opponent-args="--no-compile"]

Both load SmolLM2-135M-Instruct, hold it in NF4 with double quantization, and train LoRA of rank 16 on all linear layers
on rows of 512 tokens. The two processes stay alive and take turns step by step, so that a machine whose speed drifts
slows both; the ratio is the median of the ratios of neighbouring steps. The opponent runs in the oracle environment
(scripts/setup_oracle.sh). A table for people, then one JSON line.
"""

import argparse
import json
import os
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
WARM_UP = 2  # steps of each that are not counted


class Player:
    """A process that does one training step each time it is asked, and tells how long it took."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._started = time.perf_counter()
        self._process = subprocess.Popen(command, text=True, env=os.environ | environment, **pipes)

    def turn(self) -> dict[str, Any]:
        """One step's record."""
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


def duel(ours: list[str], theirs: list[str], cache: str, steps: int) -> dict[str, Any]:
    """Steps in turn; both start one after the other, so that neither's start-up slows the other's."""
    players = []
    firsts = []
    for command in (ours, theirs):
        players.append(Player(command, {"QLORA_JAX_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}))
        firsts.append(players[-1].turn())
    turns: list[tuple[dict, dict]] = []
    for _ in range(WARM_UP + steps):
        turns.append((players[0].turn(), players[1].turn()))
    for player in players:
        player.close()
    timed = turns[WARM_UP:]
    names = ("ours", "theirs")
    return {
        **{
            name: {
                "step_s": statistics.median(turn[i]["seconds"] for turn in timed),
                "peak_rss_mib": turns[-1][i]["peak_rss_mib"],
                "to_first_step_s": firsts[i]["since_start_s"],
                "loss": turns[-1][i]["loss"],
            }
            for i, name in enumerate(names)
        },
        "speed_ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in timed),
        "memory_ratio": turns[-1][0]["peak_rss_mib"] / turns[-1][1]["peak_rss_mib"],
        "steps": steps,
    }


def main() -> None:
    """Each batch size: a duel, with a cold and then a warm compilation cache of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="none", choices=["none", "names", "full"])
    parser.add_argument("--opponent-args", default="", help="further arguments of opponents/torch_qlora_cpu.py")
    args = parser.parse_args()
    gguf = str(fetch_smollm2())
    results = []
    for batch in args.batch:
        shape = ["--batch", str(batch), "--seq", str(args.seq), "--rank", str(args.rank)]
        ours = [sys.executable, str(ROOT / "scripts/bench_step.py"), "--gguf", gguf, *shape, "--remat", args.remat]
        theirs = [str(ORACLE), str(ROOT / "scripts/opponents/torch_qlora_cpu.py"), "--gguf", gguf, *shape, "--in-turns"]
        with tempfile.TemporaryDirectory() as cache:
            result = duel(ours, [*theirs, *args.opponent_args.split()], cache, args.steps)
            warm = Player(ours, {"QLORA_JAX_CACHE": cache})
            result["ours"]["to_first_step_warm_s"] = warm.turn()["since_start_s"]
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
