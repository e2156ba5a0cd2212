"""One run of a study: its settings, its folder, its inputs, and its outcome; run_files.py lists its files."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from qlora_jax.atomic_files import write_text
from qlora_jax.config import Config, ConfigError, write_config
from qlora_jax.config.parse import is_required, walk_settings
from qlora_jax.data.readers.files import content_digest
from qlora_jax.data.tokenizer.chat_template import TOKENS
from qlora_jax.studies.comparison.run_files import (
    JOB_FILE,
    OUTCOME_FILE,
    RUN_FOLDER,
    SETTINGS_FILE,
    Job,
    RunOutcome,
    Stage,
    read_job,
    read_outcome,
)
from qlora_jax.studies.comparison.settings import Settings
from qlora_jax.studies.comparison.study import Pair, Study, data_settings, output_of, sources


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
        search = f"learning rate {self.settings.get('optim.learning_rate')}, seed {self.seed}"
        return {"calibration": "calibration", "search": search, "final": f"seed {self.seed}"}[self.stage]

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
