"""One run of a study: its settings, its folder and files, its inputs, and its outcome."""

import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypedDict

from qlora_jax.atomic_files import write_text
from qlora_jax.config import Config, ConfigError, write_config
from qlora_jax.config.parse import is_required, walk_settings
from qlora_jax.data.readers.files import content_digest
from qlora_jax.data.tokenizer.chat_template import TOKENS
from qlora_jax.line_digests import warn_without_digests, with_digest, without_digest
from qlora_jax.metadata import decode_json, read_json, read_text
from qlora_jax.studies.comparison.settings import Settings
from qlora_jax.studies.comparison.study import Pair, Study, data_settings, output_of, sources

# The files of one run of a study. A worker imports this, so it imports nothing large.
#
#     OUTPUT/runs/METHOD/TASK/NAME/settings.yaml    the configuration of the training run
#     OUTPUT/runs/METHOD/TASK/NAME/job.json         the run's inputs, and how it is scored
#     OUTPUT/runs/METHOD/TASK/NAME/run              the folder of the training run
#     OUTPUT/runs/METHOD/TASK/NAME/log.txt          what its commands printed
#     OUTPUT/runs/METHOD/TASK/NAME/failure.txt      why it failed, if it did
#     OUTPUT/runs/METHOD/TASK/NAME/outcome.json     the results of a finished run
#
# A run is finished if its outcome exists. It is written last and complete, so a run counts once or not at all.

SETTINGS_FILE, JOB_FILE, RUN_FOLDER, LOG_FILE = "settings.yaml", "job.json", "run", "log.txt"
FAILURE_FILE, OUTCOME_FILE = "failure.txt", "outcome.json"
PERFORM_AGAIN = "Delete this file to perform the run again"
MAX_BYTES = 256 << 20  # largest outcome file; it has two numbers per row

Stage = Literal["calibration", "search", "final"]


class Job(TypedDict):
    """The content of job.json.

    Keys:
      kind, evaluate, measure: how the run is scored; evaluate is None for a run that is not.
      directory: the folder in which relative paths start.
      inputs: everything that determines the outcome, by name.
    """

    stage: Stage
    kind: str
    evaluate: dict[str, object] | None
    measure: str
    directory: str
    inputs: dict[str, object]


class RunOutcome(TypedDict):
    """The content of outcome.json.

    Keys:
      seconds: time in training steps, with their wait for data.
      seconds_per_step: without the first step of each length, which compiles; 0 without steps.
      peak_bytes: peak memory, or None if nothing reports it or the run diverged.
      search_loss: final loss on the rows of the search. None without them, or if the run diverged: a loss or a gradient
        was not finite.
      values, weights: of each held-out row; the measure is the sum of values over the sum of weights.
    """

    inputs: dict[str, object]
    steps: int
    seconds: float
    seconds_per_step: float
    peak_bytes: int | None
    search_loss: float | None
    values: list[float]
    weights: list[float]


def read_job(folder: Path) -> Job:
    """Returns the content of a run's job.json."""
    return read_json(folder / JOB_FILE, Job)


def write_outcome(folder: Path, outcome: RunOutcome) -> None:
    """Writes a run's outcome.json with a digest."""
    write_text(folder / OUTCOME_FILE, with_digest(json.dumps(outcome)))


def read_outcome(folder: Path, study: Path) -> RunOutcome:
    """Reads a run's outcome.json.

    Args:
      study: the study's folder; a missing digest warns once per study.

    Raises:
      ValueError: the file is damaged.
    """
    path = folder / OUTCOME_FILE
    content = read_text(path, MAX_BYTES)
    text = without_digest(content, f"{path}", PERFORM_AGAIN)
    if text == content:
        warn_without_digests(study)
    outcome = decode_json(text, RunOutcome, path)
    values, weights = outcome["values"], outcome["weights"]
    sound = len(values) == len(weights) and all(map(math.isfinite, (*values, *weights)))
    if not sound or (weights and sum(weights) <= 0):
        raise ValueError(
            f"{path}: values, weights: found {len(values)} and {len(weights)} numbers, expected as many, all finite, "
            f"with weights above zero. {PERFORM_AGAIN}"
        )
    return outcome


# Runs `python WORDS...` as `... end_with_parent PARENT WORDS...`, and ends it with the process PARENT.
#
# A training run would otherwise survive a worker that was killed, and keep its folder locked. The system sends SIGTERM
# when the parent is gone (Linux), and the run then saves a checkpoint.

PR_SET_PDEATHSIG = 1


def main(parent: int, words: list[str]) -> None:
    """Asks for the signal, and replaces this process by the command.

    Args:
      parent: id of the process that starts this one. It may have ended before this process could ask for its id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the system knew
        sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run of a study.

    Attributes:
      settings: training settings besides those of method and task: seed, steps, rank, learning rate.
    """

    study: Study
    stage: Stage
    method: str
    task: str
    settings: Settings

    @property
    def seed(self) -> int:
        """The training seed."""
        seed = self.settings["train.seed"]
        assert isinstance(seed, int)
        return seed

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        rate = f"learning rate {self.settings.get('optim.learning_rate')}"
        return {"calibration": "calibration", "search": rate, "final": f"seed {self.seed}"}[self.stage]

    @property
    def label(self) -> str:
        """The run in one line, for people."""
        return f"{self.method}, {self.task}, {self.name}"

    @property
    def folder(self) -> Path:
        """The absolute path of the run's folder."""
        return output_of(self.study) / "runs" / self.method / self.task / self.name

    @property
    def config(self) -> Config:
        """The configuration of the training run."""
        data = data_settings(self.study, (self.method, self.task), search=self.stage == "search")
        output = {"output": str(self.folder / RUN_FOLDER)}
        return self.study.config(self.method, self.task, {**data, **self.settings, **output})

    def job(self) -> Job:
        """Returns the content of job.json."""
        task = self.study.tasks[self.task]
        evaluate: dict[str, object] | None = {**task.settings.evaluate} if self.stage == "final" else None
        return {
            "stage": self.stage,
            "kind": task.kind,
            "evaluate": evaluate,
            "measure": task.settings.measure,
            "directory": str(Path.cwd()),
            "inputs": self._inputs(evaluate),
        }

    def _inputs(self, evaluate: Mapping[str, object] | None) -> dict[str, object]:
        """Returns the settings that differ from the defaults, what is evaluated, and the content of files."""
        task = self.study.tasks[self.task]
        inputs = _changed_settings(self.config)
        if evaluate is not None:
            inputs |= {f"evaluate.{key}": value for key, value in evaluate.items()} | {"measure": task.settings.measure}
        others = {*task.training} - {*sources(self.config.data.train)}
        contents = {path: digest for path, digest in task.digests.items() if path not in others}
        templates = [self.config.data.chat_template, (evaluate or {}).get("chat_template")]
        contents |= {path: content_digest(path) for path in templates if isinstance(path, str) and path not in TOKENS}
        return inputs | {f"content of {path}": digest for path, digest in contents.items()}

    @property
    def finished(self) -> bool:
        """True if the run has its outcome."""
        return (self.folder / OUTCOME_FILE).exists()

    def outcome(self) -> RunOutcome:
        """Returns the outcome of a finished run; raises ValueError if it is damaged."""
        return read_outcome(self.folder, output_of(self.study))

    def prepare(self) -> None:
        """Writes the run's files, unless it has them."""
        if not (self.folder / JOB_FILE).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.config, self.folder / SETTINGS_FILE)
            write_text(self.folder / JOB_FILE, json.dumps(self.job(), indent=1) + "\n")


def run_of(study: Study, stage: Stage, pair: Pair, settings: Settings) -> Run:
    """Returns the run of a method and a task."""
    return Run(study=study, stage=stage, method=pair[0], task=pair[1], settings=settings)


def check_unchanged(runs: Iterable[Run]) -> None:
    """Raises ConfigError that lists the runs that were started with other inputs."""
    problems = []
    for run in runs:
        if (run.folder / JOB_FILE).exists():
            then, now = read_job(run.folder)["inputs"], json.loads(json.dumps(run.job()["inputs"]))
            changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
            if changed:
                problems.append(
                    f"{run.folder}: started with other values of {', '.join(changed)}. Give another output, or delete "
                    "the folder"
                )
    if problems:
        raise ConfigError(problems)


def _changed_settings(config: Config) -> dict[str, object]:
    """Returns the settings that differ from their defaults, by dotted name; without the output."""
    changed: dict[str, object] = {}
    for key, field, _ in walk_settings(Config):
        value: object = config
        for name in key.split("."):
            value = getattr(value, name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if key != "output" and (is_required(field) or value != default):
            changed[key] = value
    return changed
