"""Small studies for tests, finished runs without training, and a launcher that performs runs in this process."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import yaml

from qlora_jax.studies.comparison.run import Run
from qlora_jax.studies.comparison.run_files import FAILURE_FILE, RunOutcome, write_outcome
from qlora_jax.studies.comparison.run_study import run_study, sized_settings
from qlora_jax.studies.comparison.study import Study, read_study
from qlora_jax.studies.comparison.train_and_score import Lost

BASE = {
    "model": {"path": "smollm2-135m"},
    "optim": {"learning_rate": 5e-4},
    "train": {"micro_batch_size": 2, "accumulation": 1},
}
METHODS = {"lora": {}, "low rank": {"lora.rank": 4}, "vectors": {"lora.method": "ia3"}}


def write_rows(path: Path, start: int, count: int) -> str:
    rows = [{"prompt": f"say {number}", "completion": str(number)} for number in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def study_of(folder: Path, **changes: object) -> dict[str, object]:
    """Writes the files of a study; returns the study as a dict, with top-level keys replaced by `changes`."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    task = {
        "train": write_rows(folder / "train.jsonl", 0, 40),
        "search": write_rows(folder / "search.jsonl", 100, 8),
        "evaluate": {"rows": write_rows(folder / "heldout.jsonl", 200, 10)},
        "measure": "loss per token",
    }
    study = {
        "base": str(folder / "base.yaml"),
        "methods": METHODS,
        "tasks": {"numbers": task},
        "seeds": [0, 1, 2],
        "budget": {"steps": 3},
        "learning_rates": [0.001, 0.01],
        "output": str(folder / "study"),
    }
    return study | changes


def write_study(folder: Path, **changes: object) -> str:
    """Writes a study and its files; returns the path of the study."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_of(folder, **changes), sort_keys=False))
    return str(path)


def read(folder: Path, **changes: object) -> Study:
    """Returns a checked study."""
    return read_study(write_study(folder, **changes))


def finish(run: Run, loss: float = 1.0, rows: int = 10, **changes: object) -> None:
    """Writes the outcome of a run as if it had been performed."""
    rng = np.random.default_rng([run.seed, *run.method.encode()])
    weights = np.arange(1, rows + 1)
    outcome = {
        "inputs": run.job()["inputs"],
        "steps": 3,
        "seconds": 1.5,
        "seconds_per_step": 0.5,
        "peak_bytes": 1 << 20,
        "search_loss": None if run.stage == "final" else loss,
        "values": (weights * (loss + 0.1 * rng.normal(size=rows))).tolist() if run.stage == "final" else [],
        "weights": weights.tolist() if run.stage == "final" else [],
    }
    write_outcome(run.folder, cast(RunOutcome, outcome | changes))


class Ended:
    """A run that ended when it was started."""

    def __init__(self, reason: str = ""):
        self.reason, self.cancelled = reason, False

    def done(self) -> bool:
        return True

    def end(self) -> str:
        return self.reason

    def cancel(self) -> None:
        self.cancelled = True


class Inline:
    """Performs each run in this process when it is started; `perform` is called with the run's folder."""

    slots: int | None = 1

    def __init__(self, perform: Callable[[Path], None]):
        self._perform = perform
        self.started: list[Path] = []

    def start(self, folder: Path) -> Ended:
        self.started.append(folder)
        try:
            self._perform(folder)
        except Lost as error:
            return Ended(str(error))
        return Ended()


def by_folder(runs: list[Run]) -> Mapping[Path, Run]:
    return {run.folder: run for run in runs}


class OutcomeWriter(Inline):
    """Writes outcomes; `outcome(run)` returns the changes of an outcome, or the text of a failure."""

    def __init__(self, outcome):
        super().__init__(self._write)
        self._outcome, self.runs = outcome, {}

    def _write(self, folder):
        changes = self._outcome(self.runs[folder])
        if isinstance(changes, str):
            (folder / FAILURE_FILE).write_text(changes)
        else:
            finish(self.runs[folder], **changes)


def conduct(study, outcome):
    """Performs a study; returns its runs, and those that were started, in order."""
    launcher, prepare = OutcomeWriter(outcome), Run.prepare

    def remembered(run):
        launcher.runs[run.folder] = run
        prepare(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "prepare", remembered)
        runs = run_study(study, sized_settings(study)[0], launcher, 0, lambda line: None)
    return runs, [launcher.runs[folder] for folder in launcher.started]
