"""The files of one run of a study. A worker imports this, so it imports nothing large.

    OUTPUT/runs/METHOD/TASK/NAME/settings.yaml    the configuration of the training run
    OUTPUT/runs/METHOD/TASK/NAME/job.json         the run's inputs, and how it is scored
    OUTPUT/runs/METHOD/TASK/NAME/run              the folder of the training run
    OUTPUT/runs/METHOD/TASK/NAME/log.txt          what its commands printed
    OUTPUT/runs/METHOD/TASK/NAME/failure.txt      why it failed, if it did
    OUTPUT/runs/METHOD/TASK/NAME/outcome.json     the results of a finished run

A run is finished if its outcome exists. It is written last and complete, so a run counts once or not at all.
"""

import json
import math
from pathlib import Path
from typing import Literal, TypedDict

from qlora_jax.atomic_files import write_text
from qlora_jax.line_digests import warn_without_digests, with_digest, without_digest
from qlora_jax.untrusted_json import decode_json, read_json, read_text

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
