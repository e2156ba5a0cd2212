"""Writes the folder of a run with the code of a run, one record after another, as fast as a test asks for them."""

import json
import os
import socket
from pathlib import Path

from qlora_jax.config import Config, DataArgs, ModelArgs, TrainArgs, write_config
from qlora_jax.training.metrics.metrics_file import MetricsFile

PLANNED = 3 << 30


class SmallRun:
    """A run of 10 steps in `folder`, which this process trains; a context manager, which closes its file."""

    def __init__(self, folder: Path, **train: int):
        self.folder = folder
        folder.mkdir(parents=True)
        self.config = Config(
            model=ModelArgs(path="models/base"),
            data=DataArgs(train="rows.jsonl", eval_fraction=0.1),
            train=TrainArgs(**{"epochs": 2.0, "save_every": 2, "eval_every": 2} | train),
            output=str(folder),
        )
        write_config(self.config, folder / "config.yaml")
        plan = {"device_bytes": {"weights": PLANNED - 9, "scratch": 9}, "questions_bytes": None}
        report = {"data": {"steps": [2, 3]}, "memory_plan": plan}
        (folder / "report.json").write_text(json.dumps(report))
        self.lock(os.getpid())
        self._file = MetricsFile(folder / "metrics.jsonl", 0)

    def lock(self, process: int | None, host: str = socket.gethostname()) -> None:
        """Writes the lock file of a process, or removes it."""
        file = self.folder / "run.lock"
        if process is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(f"process {process} on {host}, since 2026-12-01 12:00:00+00:00\n")

    def steps(self, first: int, end: int, **values: float) -> None:
        """Writes the records of the steps from `first` up to `end`, exclusive."""
        for step in range(first, end):
            known = {"loss": 3.0 / step, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens": 100, "length": 64}
            known |= {"supervised_tokens": 50, "seconds": 2.0, "data_seconds": 1.0, "device_bytes": 2 << 30}
            self._file.write({"step": step} | known | values)

    def evaluation(self, step: int, loss: float) -> None:
        """Writes the record of an evaluation, with a question metric."""
        ends = {"eval_loss_low": loss - 0.1, "eval_loss_high": loss + 0.1}
        right = {"letters_right": 0.5, "letters_right_low": 0.4, "letters_right_high": 0.6}
        self._file.write({"step": step, "eval_loss": loss, "eval_perplexity": 2.0} | ends | right)

    def sample(self, step: int, reply: str) -> None:
        """Writes the reply of a step to a prompt."""
        with MetricsFile(self.folder / "samples.jsonl", step or 1) as file:
            file.write({"step": step, "prompt": {"prompt": "Hello?"}, "reply": reply, "end": "stop"})

    def __enter__(self) -> "SmallRun":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file of records."""
        self._file.__exit__()

    def resume(self, step: int) -> None:
        """Resumes the run from a checkpoint: the records after it are written again."""
        self.close()
        self._file = MetricsFile(self.folder / "metrics.jsonl", step)
