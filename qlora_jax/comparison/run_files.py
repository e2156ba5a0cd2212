"""The files of one run of a study. A worker imports this, so it imports nothing large.

    OUTPUT/runs/METHOD/TASK/NAME/settings.yaml    the configuration of the training run
    OUTPUT/runs/METHOD/TASK/NAME/job.json         the run's inputs, and how it is scored
    OUTPUT/runs/METHOD/TASK/NAME/run              the folder of the training run
    OUTPUT/runs/METHOD/TASK/NAME/log.txt          what its commands printed
    OUTPUT/runs/METHOD/TASK/NAME/failure.txt      why it failed, if it did
    OUTPUT/runs/METHOD/TASK/NAME/outcome.json     the results of a finished run

A run is finished if its outcome exists. It is written last and complete, so a run counts once or not at all.
"""

from pathlib import Path
from typing import Literal, TypedDict

from qlora_jax.metadata import read_json

SETTINGS_FILE, JOB_FILE, RUN_FOLDER, LOG_FILE = "settings.yaml", "job.json", "run", "log.txt"
FAILURE_FILE, OUTCOME_FILE = "failure.txt", "outcome.json"
MAX_BYTES = 256 << 20  # of an outcome, which has two numbers per row

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
