"""Compares classification with PyTorch + transformers + peft + bitsandbytes: accuracy and speed on SST-2 and MRPC.

    python -m scripts.bench.classification [--tasks sst2 mrpc] [--seeds 2] [--block 8] [--output FILE] [--steps 2]
    python -m scripts.bench.classification --float32 --seeds 2 [--tasks sst2]

Both train LoRA of rank 16 on all linear layers of SmolLM2 in NF4, and a new head, in bfloat16. Each step has the same
rows for both, in the same order, with the same learning rate; adapter and head start with the same values. Ours packs
the rows of a step into one row (`data.packing`), and transformers pads them to the longest. After a run each scores the
held-out rows. The processes take turns of `--block` steps; the first turn does not count.

  accuracy    share of right held-out rows, mean over seeds
  difference  ours - theirs, with its p-value and 95 % interval over seeds and held-out rows, or over rows for one seed
  speed       their seconds per step / ours, the median over turns of the same steps, with its 95 % interval
  scoring     their seconds for the held-out rows / ours, of the last seed
  whole       seconds of all steps and scorings, compiling included
  losses      the largest distance of the losses of a step in the first 10 steps, and in all, and how many predictions
              differ: with --float32, which computes all runs in float32, rounding alone should separate the two

Of several configurations of the opponent the fastest counts. Before the first update, in float32, both must have the
same loss to TOLERANCE nats, otherwise the script ends with an error, as it does if ours or all opponents fail. Data:
QLORA_JAX_LOCAL_DATA is the folder with GLUE's files (sst2_train.tsv.gz and so on). The opponent runs in the oracle
environment (scripts/setup_oracle.sh). --steps N is a smoke test of N steps and few held-out rows; its figures are
meaningless.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_jax.measures.statistics import wilson_interval
from qlora_jax.studies.statistics import crossed_mean
from scripts.bench.support.classification_job import TASKS, Task, read_split, write_job
from scripts.bench.support.environment import OPPONENTS, ORACLE, OURS, compilation_caches
from scripts.bench.support.interleave import Record, Turns, WorkerGroup, ratio_interval
from scripts.bench.support.progress import phase, phases
from scripts.fetch_smollm2 import fetch_smollm2

CONFIGURATIONS = {"eager": ["--compile", "none"], "compiled": ["--compile", "layers"]}
SMOKE_ROWS = 16  # held out, with --steps
OURS_FLOAT32, THEIRS_FLOAT32 = ["--compute_dtype", "float32"], ["--dtype", "fp32"]
EARLY = 10  # steps, before the optimizer has amplified rounding
TOLERANCE = 1e-3  # nats, in float32; in bfloat16, first losses of either side are 0.01 nats off (standard deviation)
Runs = dict[str, list[tuple[Turns, Record]]]  # by worker, the turns and the scoring of each seed


def commands_of(job: Path, configurations: Sequence[str], float32: bool) -> dict[str, list[str]]:
    """Returns the command of ours, and those of the opponent by configuration."""
    ours = [sys.executable, "-m", "scripts.bench.workers.classification", "--job", str(job)]
    theirs = [ORACLE, str(OPPONENTS / "torch_classification.py"), "--job", str(job)]
    ours, theirs = ([*ours, *OURS_FLOAT32], [*theirs, *THEIRS_FLOAT32]) if float32 else (ours, theirs)
    return {OURS: ours, **{name: [*theirs, *CONFIGURATIONS[name]] for name in configurations}}


def measure(job: Path, configurations: Sequence[str], block: int, timeout_s: float, float32: bool) -> Record:
    """Returns the figures of a task, and failures."""
    described = json.loads(job.read_text())
    runs: Runs = {}
    with compilation_caches(keep=True) as environment, WorkerGroup(environment, timeout_s) as workers:
        first_losses = first_losses_float32(workers, job)
        for name, command in commands_of(job, configurations, float32).items():
            workers.open(name, command)
        for run in described["runs"]:
            phase(f"seed {run['seed']}: {len(run['steps'])} steps by {', '.join(workers.names)}")
            for name, record in train_and_score(workers, len(run["steps"]), block).items():
                runs.setdefault(name, []).append(record)
        finished = {name: runs[name] for name in workers.names}
    right = np.array(described["right"])
    players = {name: summary(each, right) for name, each in finished.items()}
    return {"players": players, "float32": first_losses, **verdict(finished, right), "failures": workers.failures}


def first_losses_float32(workers: WorkerGroup, job: Path) -> dict[str, float]:
    """Returns the loss of the first seed's first step in float32, of ours and of the opponent, where it can be run."""
    commands = commands_of(job, ["eager"], float32=True)
    records = {name: workers.once(f"{name}, float32", command) for name, command in commands.items()}
    return {name: record["loss"] for name, record in records.items() if record is not None}


def train_and_score(workers: WorkerGroup, steps: int, block: int) -> dict[str, tuple[Turns, Record]]:
    """Returns the turns of one seed, and the scoring at its end, of each worker that did not fail."""
    turns: dict[str, Turns] = {name: [] for name in workers.names}
    for begin in phases(f"{steps} steps, block", range(0, steps, block)):
        for name in workers.names:
            turns[name].append(workers.turn(name, min(block, steps - begin)))
    scorings = {name: workers.turn(name, 1) for name in workers.names}
    return {name: (turns[name], records[0]) for name, records in scorings.items() if records}


def summary(runs: Sequence[tuple[Turns, Record]], right: np.ndarray) -> Record:
    """Returns the figures of one worker."""
    right_SR = right_rows(runs, right)
    mean = float(right_SR.mean())
    counted = [seconds for turns, _ in runs for seconds in block_seconds(turns)]
    return {
        "accuracy": mean,
        "interval": wilson_interval(mean * len(right), len(right)),
        "accuracy_by_seed": right_SR.mean(axis=1).tolist(),
        "steps_s": sum(counted),
        "scoring_s": runs[-1][1]["seconds"],
        "whole_s": sum(record["seconds"] for turns, scored in runs for turn in (*turns, [scored]) for record in turn),
        "losses": [losses(turns) for turns, _ in runs],
        "peak_rss_mib": runs[-1][1]["peak_rss_mib"],
    }


def right_rows(runs: Sequence[tuple[Turns, Record]], right: np.ndarray) -> np.ndarray:
    """Returns, for each seed, which held-out rows are right."""
    return np.array([np.argmax(scored["outputs"], axis=1) == right for _, scored in runs])


def block_seconds(turns: Turns) -> list[float]:
    """Returns the seconds of each turn, without its first step unless it is the only one."""
    return [sum(record["seconds"] for record in (turn[1:] or turn)) for turn in turns]


def verdict(runs: Runs, right: np.ndarray) -> Record:
    """Returns ours against the fastest opponent; None if either side failed."""
    seconds = {name: [s for turns, _ in each for s in block_seconds(turns)] for name, each in runs.items()}
    theirs = min((name for name in runs if name != OURS), key=lambda name: sum(seconds[name]), default=None)
    if theirs is None or OURS not in runs:
        return {"opponent": theirs, "speed": None}
    ratios = [a / b for a, b in zip(seconds[theirs], seconds[OURS], strict=True)]
    ours_SR, theirs_SR = (right_rows(runs[name], right).astype(np.float64) for name in (OURS, theirs))
    difference = crossed_mean(ours_SR - theirs_SR)
    return {
        "opponent": theirs,
        "speed": statistics.median(ratios),
        "speed_interval": ratio_interval(ratios),
        "scoring": runs[theirs][-1][1]["seconds"] / runs[OURS][-1][1]["seconds"],
        "difference": difference.value,
        "difference_interval": difference.interval,
        "difference_p": difference.p,
        **distances(runs[OURS], runs[theirs]),
    }


def distances(ours: Sequence[tuple[Turns, Record]], theirs: Sequence[tuple[Turns, Record]]) -> Record:
    """Returns the largest distance of the losses of a step, early and in all, and how many predictions differ."""
    pairs = zip(ours, theirs, strict=True)
    apart = [np.abs(np.subtract(losses(turns), losses(others))) for (turns, _), (others, _) in pairs]
    predicted = [np.argmax([scored["outputs"] for _, scored in runs], axis=-1) for runs in (ours, theirs)]
    return {
        "losses_apart_early": float(max(each[:EARLY].max() for each in apart)),
        "losses_apart": float(max(each.max() for each in apart)),
        "predictions_differ": int((predicted[0] != predicted[1]).sum()),
        "predictions": int(predicted[0].size),
    }


def losses(turns: Turns) -> list[float]:
    """Returns the loss of each step."""
    return [record["loss"] for turn in turns for record in turn]


def disagreement(name: str, result: Record) -> list[str]:
    """Returns the failures if nothing was compared, and a problem if the losses in float32 differ."""
    if result["speed"] is None or len(result["float32"]) < 2:
        return [f"{name}: {player}: {failure}" for player, failure in result["failures"].items()]
    ours, theirs = result["float32"].values()
    return [f"{name}: first loss {ours - theirs:+.5f} nats apart in float32"] if abs(ours - theirs) > TOLERANCE else []


def show(name: str, task: Task, result: Record) -> None:
    """Prints the table of one task."""
    print(f"\n{name}: {task.held_out}")
    print(f"{'':<12}" + "".join(f"{column:>14}" for column in ("accuracy", "steps s", "scoring s", "whole s", "MiB")))
    for player, found in result["players"].items():
        low, high = found["interval"]
        accuracy = f"{found['accuracy']:.1%}"
        cells = "".join(f"{found[field]:>14.1f}" for field in ("steps_s", "scoring_s", "whole_s"))
        print(f"  {player:<10}{accuracy:>14}{cells}{found['peak_rss_mib']:>14.0f}   [{low:.1%}, {high:.1%}]")
    for player, failure in result["failures"].items():
        print(f"  {player}: FAILED: {failure}")
    if result["speed"] is not None:
        low, high = result["difference_interval"]
        points = f"{100 * result['difference']:+.2f} points [{100 * low:.2f}, {100 * high:.2f}]"
        print(f"  difference {points}, p {result['difference_p']:.2f}")
        low, high = result["speed_interval"]
        print(
            f"  speed {result['speed']:.2f}x [{low:.2f}, {high:.2f}], scoring {result['scoring']:.2f}x, against "
            f"{result['opponent']}"
        )
        early, apart = result["losses_apart_early"], result["losses_apart"]
        differ = f"{result['predictions_differ']} of {result['predictions']:,} predictions differ"
        print(f"  losses {early:.1e} nats apart in the first {EARLY} steps, {apart:.1e} in all; {differ}")
    sys.stdout.flush()


def main() -> None:
    """Measures the tasks in order, and rewrites the output file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--model", help="a GGUF file or a Hugging Face folder (default: SmolLM2)")
    parser.add_argument("--configurations", nargs="+", default=["eager"], choices=CONFIGURATIONS)
    parser.add_argument("--seeds", type=int, help="runs of each task (default: the task's)")
    parser.add_argument("--block", type=int, default=8, help="steps per turn")
    parser.add_argument("--steps", type=int, help="run only this many steps, as a smoke test")
    parser.add_argument("--float32", action="store_true", help="all runs in float32, to compare losses and predictions")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a step counts as failed")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    results: dict[str, Record] = {}
    for name in args.tasks:
        task = TASKS[name]
        try:
            train, held_out = (read_split(file, task.read) for file in (task.train, task.held_out))
            model = args.model or str(fetch_smollm2())
        except OSError as error:
            sys.exit(f"error: {error}")
        rows = task.held_out_rows if args.steps is None else SMOKE_ROWS
        limits = {"train_rows": task.train_rows, "steps": args.steps or task.train_rows}
        sizes = {"max_length": task.max_length, "seeds": range(args.seeds or task.seeds), **limits}
        with tempfile.TemporaryDirectory() as folder:
            job = write_job(Path(folder), model, train, held_out[:rows], **sizes)
            results[name] = measure(job, args.configurations, args.block, args.timeout, args.float32)
        show(name, task, results[name])
        if args.output:
            args.output.write_text(json.dumps({"steps": args.steps, "tasks": results}, indent=1))
    sys.exit("\n".join(problem for name in results for problem in disagreement(name, results[name])) or None)


if __name__ == "__main__":
    main()
