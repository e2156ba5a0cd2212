"""Trains with some settings in many ways, with some seeds, and compares; started again, it goes on.

    python scripts/sweep.py --config base.yaml --output sweeps/rank --seeds 0 1 2 --set 'lora.rank=[4, 16, 64]' \
        --set 'lora.target_modules=[all-linear, [q_proj, v_proj]]' [--rows heldout.jsonl]
    python scripts/sweep.py ... --cell --cell lora.rank=64 --cell model.quant_type=none lora.dropout=0.1

--set: every combination of the values; --cell: settings that go together, with none as the configuration has them;
--share: settings of all runs, over those of the configuration.
Each cell and seed is a run of its own, `python -m qlora_jax.train`, in OUTPUT/runs; one that is done is not done
again (and is refused where the configuration, the settings or the rows have changed since), one that was stopped goes
on from its checkpoint, or begins anew where it has none. Compared is the held-out loss at the end; with --rows, what
`python -m qlora_jax.evaluate --rows` says of the checkpoint instead.
OUTPUT/results.json, results.png, and two tables: means over seeds, and differences from the first cell, seed by seed;
each with its 95 % interval by Student's t, where there are two seeds or more.
"""

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from rich.console import Console
from rich.table import Table

from qlora_jax.data.readers.files import content_digest
from qlora_jax.io.checkpoint import saved_steps
from qlora_jax.training.metrics import read_metrics

# Quantile 0.975 of Student's t by degrees of freedom; beyond them, of the normal distribution.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL_95 = 1.960


class Cell(NamedTuple):
    """One combination of settings."""

    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people and folders: `lora.rank=4 lora.alpha=8`."""
        return " ".join(f"{key}={_short(value)}" for key, value in self.settings.items()) or "as configured"


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def cells(alternatives: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination, the last setting changing first."""
    return [Cell(dict(zip(alternatives, each, strict=True))) for each in itertools.product(*alternatives.values())]


def read_cell(words: Sequence[str]) -> Cell:
    """The settings `section.key=value` of each word.

    Raises:
      SystemExit: a word that is none.
    """
    wrong = [word for word in words if not all(word.partition("="))]
    if wrong:
        raise SystemExit(f"{' '.join(wrong)!r}: expected section.key=value of each word")
    pairs = (word.partition("=") for word in words)
    return Cell({key: yaml.safe_load(text) for key, _, text in pairs})


def read_alternatives(words: Sequence[str]) -> dict[str, list[Any]]:
    """`section.key=[value, value]` of each word.

    Raises:
      SystemExit: a word that is none.
    """
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = yaml.safe_load(text) if equals else None
        if not isinstance(values, list) or not values:
            raise SystemExit(f"--set {word!r}: expected section.key=[value, value, ...]")
        found[key] = values
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """mean -+ t s / sqrt(n), 95 %; None of one value."""
    if len(values) < 2:
        return None
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else NORMAL_95
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    return middle - half, middle + half


class Sweep(NamedTuple):
    """What is run, and where."""

    config: Path
    output: Path
    shared: Mapping[str, Any]
    rows: str | None
    answer_start: str | None

    def outcome(self, cell: Cell, seed: int) -> dict[str, float]:
        """The measures of one run by name, which is trained, or goes on, where it is not done."""
        run = self.output / "runs" / cell.name.replace("/", "_") / f"seed {seed}"
        told, made_of = run / "outcome.json", self._made_of(cell)
        if not told.exists():
            self._train(cell, seed, run)
            measures = self._evaluate(run) if self.rows else {"held-out loss": _last_loss(run)}
            told.write_text(json.dumps({"made_of": made_of, "measures": measures}))
        outcome = json.loads(told.read_text())
        _check_same(run, outcome["made_of"], made_of)
        return outcome["measures"]

    def _made_of(self, cell: Cell) -> dict[str, Any]:
        """What a run's measures follow from, beside its seed; files by their content."""
        files = {"--config": str(self.config), "--rows": self.rows}
        contents = {name: path and content_digest(path) for name, path in files.items()}
        return {**contents, "--answer_start": self.answer_start, **self.shared, **cell.settings}

    def _train(self, cell: Cell, seed: int, run: Path) -> None:
        settings = {**self.shared, **cell.settings, "train.seed": seed, "output": str(run)}
        options = [word for key, value in settings.items() for word in (f"--{key}", _word(value))]
        going_on = bool(saved_steps(run))
        if run.exists() and not going_on:
            shutil.rmtree(run)  # what a run leaves that was cut off before its first checkpoint
        _python("qlora_jax.train", "--config", str(self.config), *options, *(["--resume"] if going_on else []))

    def _evaluate(self, run: Path) -> dict[str, float]:
        scores = run / "scores.json"
        options = ["--rows", str(self.rows), "--columns", "[checkpoint]", "--json", str(scores)]
        options += [] if self.answer_start is None else ["--answer_start", self.answer_start]
        _python("qlora_jax.evaluate", "--run", str(run), *options)
        columns = json.loads(scores.read_text())["tasks"]["rows"]["columns"]
        return {name: measure["value"] for name, measure in columns["checkpoint"].items()}


def _check_same(run: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises SystemExit for a run that is done, but not as it would be now."""
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        raise SystemExit(
            f"{run}: is done, with another {', another '.join(changed)}, so it can't be compared with runs of now. "
            "Give another --output, or delete the folder"
        )


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _python(module: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *words], check=False)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(words)}: ended with {done.returncode}; start again to go on from here")


def _last_loss(run: Path) -> float:
    losses = [record["eval_loss"] for record in read_metrics(run / "metrics.jsonl") if "eval_loss" in record]
    if not losses:
        raise SystemExit(f"{run} has no held-out loss: set data.eval or data.eval_fraction, or give --rows")
    return losses[-1]


Results = Mapping[str, Mapping[str, Sequence[float]]]  # values of each seed, by cell and measure


def differences(results: Results) -> dict[str, dict[str, list[float]]]:
    """What each cell but the first has more than the first, seed by seed."""
    (_, first), *others = results.items()
    return {
        cell: {name: [a - b for a, b in zip(values, first[name], strict=True)] for name, values in measures.items()}
        for cell, measures in others
    }


def table(results: Results, title: str) -> Table:
    """Measures by cell, each with its mean and interval."""
    names = list(next(iter(results.values())))
    drawn = Table(title=title)
    for heading in ("settings", *names):
        drawn.add_column(heading, justify="left" if heading == "settings" else "right", overflow="fold")
    for cell, measures in results.items():
        drawn.add_row(cell, *(_text(measures[name]) for name in names))
    return drawn


def _text(values: Sequence[float]) -> str:
    ends = interval(values)
    told = f"{statistics.fmean(values):.4f}"
    return told if ends is None else f"{told} [{ends[0]:.4f}, {ends[1]:.4f}]"


def plot(results: Results, path: Path) -> None:
    """A panel for each measure: seeds as points, means and intervals as bars."""
    names = list(next(iter(results.values())))
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 1 + len(names) * (0.6 + 0.4 * len(results))), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        for place, measures in enumerate(reversed(results.values())):
            values = measures[name]
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
            ends = interval(values) or (values[0], values[0])
            axis.plot(ends, [place, place], color="black", linewidth=1)
            axis.plot(statistics.fmean(values), place, "|", color="black", markersize=14)
        axis.set_yticks(range(len(results)), list(reversed(results)))
        axis.set_ylim(-0.5, len(results) - 0.5)
        axis.set_xlabel(name)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def collected(sweep: Sweep, seeds: Sequence[int], wanted: Sequence[Cell]) -> Iterator[tuple[str, Any]]:
    """(a cell's name, its measures: a value for each seed), as each is done."""
    for number, cell in enumerate(wanted):
        outcomes = []
        for place, seed in enumerate(seeds, number * len(seeds) + 1):
            print(f"run {place} of {len(wanted) * len(seeds)}: {cell.name}, seed {seed}", flush=True)
            outcomes.append(sweep.outcome(cell, seed))
        yield cell.name, {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}


def main() -> None:
    """Runs what is not done, and tells what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="settings that all runs share")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], help="section.key=[value, value, ...]")
    parser.add_argument("--cell", action="append", nargs="*", default=[], help="section.key=value ..., together")
    parser.add_argument("--share", nargs="*", default=[], help="section.key=value ..., of all runs")
    parser.add_argument("--rows", help="held-out rows that every run's checkpoint is scored on")
    parser.add_argument("--answer_start", help="with --rows: how every answer begins; what follows is scored")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(args.config, args.output, read_cell(args.share).settings, args.rows, args.answer_start)
    wanted = [read_cell(words) for words in args.cell]
    wanted += cells(read_alternatives(args.set)) if args.set or not wanted else []
    results = dict(collected(sweep, args.seeds, wanted))
    (args.output / "results.json").write_text(json.dumps({"seeds": args.seeds, "results": results}, indent=1))
    plot(results, args.output / "results.png")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table(results, "means over seeds"))
    if len(results) > 1:
        console.print(table(differences(results), f"less {next(iter(results))!r}, seed by seed"))
    print(f"written: {args.output / 'results.json'}, {args.output / 'results.png'}; runs: {args.output / 'runs'}")


if __name__ == "__main__":
    main()
