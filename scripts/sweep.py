"""Trains combinations of settings with several seeds and compares them; started again, it continues.

    python scripts/sweep.py --config base.yaml --output sweeps/rank --seeds 0 1 2 --set 'lora.rank=[4, 16, 64]' \
        --set 'lora.target_modules=[all-linear, [q_proj, v_proj]]' [--rows heldout.jsonl]
    python scripts/sweep.py ... --cell --cell lora.rank=64 --cell model.quant_type=none lora.dropout=0.1

--set takes every combination of the values. --cell takes settings that belong together; an empty --cell uses the
configuration unchanged. --share adds settings to all runs.

Each cell and seed is one run of `qlora-jax train` in OUTPUT/runs. A finished run is not repeated; if the configuration,
the settings or the rows have changed since, it raises an error. A stopped run resumes from its checkpoint, or restarts
if it has none. Runs are compared by their final held-out loss, or with --rows by the scores of `qlora-jax evaluate`.

Writes OUTPUT/results.json and results.png, and prints two tables: means over seeds, and differences from the first
cell, seed by seed. With two seeds or more, each has its 95 % interval by Student's t.
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
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from rich.console import Console
from rich.table import Table

from qlora_jax.data.readers.files import content_digest
from qlora_jax.io.checkpoint import saved_steps
from qlora_jax.io.run_lock import lock_run
from qlora_jax.training.metrics import read_metrics

# Quantiles 0.975 of Student's t for 1, 2, ... degrees of freedom; beyond the table, of the normal distribution.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL_95 = 1.960


class Cell(NamedTuple):
    """One combination of settings."""

    settings: Mapping[str, object]

    @property
    def name(self) -> str:
        """Returns the name for tables and folders: `lora.rank=4 lora.alpha=8`."""
        return " ".join(f"{key}={_short(value)}" for key, value in self.settings.items()) or "as configured"


def _short(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def cells(alternatives: Mapping[str, Sequence[object]]) -> list[Cell]:
    """Returns every combination; the last setting changes fastest."""
    return [Cell(dict(zip(alternatives, each, strict=True))) for each in itertools.product(*alternatives.values())]


def read_cell(words: Sequence[str]) -> Cell:
    """Parses words of the form `section.key=value`.

    Raises:
      SystemExit: a word has another form.
    """
    wrong = [word for word in words if not all(word.partition("="))]
    if wrong:
        raise SystemExit(f"{' '.join(wrong)!r}: not a setting (expected section.key=value)")
    pairs = (word.partition("=") for word in words)
    return Cell({key: yaml.safe_load(text) for key, _, text in pairs})


def read_alternatives(words: Sequence[str]) -> dict[str, list[object]]:
    """Parses words of the form `section.key=[value, value]`.

    Raises:
      SystemExit: a word has another form.
    """
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = yaml.safe_load(text) if equals else None
        if not isinstance(values, list) or not values:
            raise SystemExit(f"--set {word!r}: not a list of values (expected section.key=[value, value, ...])")
        found[key] = values
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % interval mean -+ t s / sqrt(n); None for one value."""
    if len(values) < 2:
        return None
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else NORMAL_95
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    return middle - half, middle + half


class Sweep(NamedTuple):
    """The settings of a sweep."""

    config: Path
    output: Path
    shared: Mapping[str, object]
    rows: str | None
    answer_start: str | None

    def outcome(self, cell: Cell, seed: int) -> dict[str, float]:
        """Returns the measures of one run by name; trains or resumes the run if it is not finished."""
        run = self.output / "runs" / cell.name.replace("/", "_") / f"seed {seed}"
        stored, inputs = run / "outcome.json", self._inputs(cell)
        if not stored.exists():
            self._train(cell, seed, run)
            measures = self._evaluate(run) if self.rows else {"held-out loss": _last_loss(run)}
            stored.write_text(json.dumps({"made_of": inputs, "measures": measures}))
        outcome = json.loads(stored.read_text())
        _check_unchanged(run, outcome["made_of"], inputs)
        return outcome["measures"]

    def _inputs(self, cell: Cell) -> dict[str, object]:
        """Returns all inputs of a run except its seed; files by a digest of their content."""
        files = {"--config": str(self.config), "--rows": self.rows}
        contents = {name: path and content_digest(path) for name, path in files.items()}
        return {**contents, "--answer_start": self.answer_start, **self.shared, **cell.settings}

    def _train(self, cell: Cell, seed: int, run: Path) -> None:
        settings = {**self.shared, **cell.settings, "train.seed": seed, "output": str(run)}
        options = [word for key, value in settings.items() for word in (f"--{key}", _word(value))]
        resume = bool(saved_steps(run))
        if run.exists() and not resume:
            _remove(run)
        _python("qlora_jax.train", "--config", str(self.config), *options, *(["--resume"] if resume else []))

    def _evaluate(self, run: Path) -> dict[str, float]:
        scores = run / "scores.json"
        options = ["--rows", str(self.rows), "--columns", "[checkpoint]", "--json", str(scores)]
        options += [] if self.answer_start is None else ["--answer_start", self.answer_start]
        _python("qlora_jax.evaluate", "--run", str(run), *options)
        columns = json.loads(scores.read_text())["tasks"]["rows"]["columns"]
        return {name: measure["value"] for name, measure in columns["checkpoint"].items()}


def _remove(run: Path) -> None:
    """Removes the remains of a run that was stopped before its first checkpoint.

    Raises:
      SystemExit: it has not stopped: another process trains in the folder.
    """
    try:
        with lock_run(run, warn=print):
            shutil.rmtree(run)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _check_unchanged(run: Path, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raises SystemExit if a finished run had other inputs."""
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        raise SystemExit(
            f"{run}: finished with other values of {', '.join(changed)}. Use another --output, or delete the folder."
        )


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _python(module: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *words], check=False)
    if done.returncode:
        raise SystemExit(
            f"{module} {' '.join(words)}: failed (exit code {done.returncode}). Start the sweep again to continue."
        )


def _last_loss(run: Path) -> float:
    losses = [record["eval_loss"] for record in read_metrics(run / "metrics.jsonl") if "eval_loss" in record]
    if not losses:
        raise SystemExit(f"{run}: no held-out loss. Set data.eval or data.eval_fraction, or pass --rows.")
    return losses[-1]


Results = Mapping[str, Mapping[str, Sequence[float]]]  # by cell and measure, one value per seed


def differences(results: Results) -> dict[str, dict[str, list[float]]]:
    """Returns the differences of all other cells from the first cell, seed by seed."""
    (_, first), *others = results.items()
    return {
        cell: {name: [a - b for a, b in zip(values, first[name], strict=True)] for name, values in measures.items()}
        for cell, measures in others
    }


def table(results: Results, title: str) -> Table:
    """Returns a table of the measures by cell, each with its mean and interval."""
    names = list(next(iter(results.values())))
    drawn = Table(title=title)
    for heading in ("settings", *names):
        drawn.add_column(heading, justify="left" if heading == "settings" else "right", overflow="fold")
    for cell, measures in results.items():
        drawn.add_row(cell, *(_text(measures[name]) for name in names))
    return drawn


def _text(values: Sequence[float]) -> str:
    ends = interval(values)
    mean = f"{statistics.fmean(values):.4f}"
    return mean if ends is None else f"{mean} [{ends[0]:.4f}, {ends[1]:.4f}]"


def plot(results: Results, path: Path) -> None:
    """Draws a panel per measure: seeds as points, means and intervals as bars."""
    names = list(next(iter(results.values())))
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 1 + len(names) * (0.6 + 0.4 * len(results))), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        for place, measures in enumerate(list(results.values())[::-1]):
            values = measures[name]
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
            ends = interval(values) or (values[0], values[0])
            axis.plot(ends, [place, place], color="black", linewidth=1)
            axis.plot(statistics.fmean(values), place, "|", color="black", markersize=14)
        axis.set_yticks(range(len(results)), [*results][::-1])
        axis.set_ylim(-0.5, len(results) - 0.5)
        axis.set_xlabel(name)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run_all(sweep: Sweep, seeds: Sequence[int], wanted: Sequence[Cell]) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Yields each cell's name and measures, one value per seed, as soon as it is finished."""
    for number, cell in enumerate(wanted):
        outcomes = []
        for place, seed in enumerate(seeds, number * len(seeds) + 1):
            print(f"run {place} of {len(wanted) * len(seeds)}: {cell.name}, seed {seed}", flush=True)
            outcomes.append(sweep.outcome(cell, seed))
        yield cell.name, {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}


def main() -> None:
    """Runs the unfinished runs, and writes and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configuration of all runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], help="section.key=[value, value, ...]")
    parser.add_argument("--cell", action="append", nargs="*", default=[], help="section.key=value ..., together")
    parser.add_argument("--share", nargs="*", default=[], help="section.key=value ..., for all runs")
    parser.add_argument("--rows", help="held-out rows, on which every checkpoint is scored")
    parser.add_argument("--answer_start", help="with --rows: the start of every answer, not scored")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(args.config, args.output, read_cell(args.share).settings, args.rows, args.answer_start)
    wanted = [read_cell(words) for words in args.cell]
    wanted += cells(read_alternatives(args.set)) if args.set or not wanted else []
    results = dict(run_all(sweep, args.seeds, wanted))
    (args.output / "results.json").write_text(json.dumps({"seeds": args.seeds, "results": results}, indent=1))
    plot(results, args.output / "results.png")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table(results, "means over seeds"))
    if len(results) > 1:
        console.print(table(differences(results), f"difference from {next(iter(results))!r}, seed by seed"))
    print(f"wrote {args.output / 'results.json'}, {args.output / 'results.png'}; runs: {args.output / 'runs'}")


if __name__ == "__main__":
    main()
