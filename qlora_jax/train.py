"""`qlora-jax train`: one finetuning run, from a model and data on disk to checkpoints and a report."""

import itertools
import shlex
import sys
from pathlib import Path

from qlora_jax import allocator
from qlora_jax.config import Command, Config, run_main, validate
from qlora_jax.config.command_line import SIGNALLED, report_error

COMMAND = Command(
    name="train",
    summary="Finetunes a model on your data; writes checkpoints, metrics and a report into a run folder.",
    example="--model ~/models/Llama-3.2-1B-Instruct --data.train chats.jsonl --output runs/mine",
    schema=Config,
    check=validate,
    flags={
        "resume": "continue from the newest checkpoint in the run folder: --config RUN/config.yaml --resume",
        "dry_run": "print and write the data report and memory plan, then stop",
        "oversized": "start even if the memory plan says that the run does not fit",
        "accept_changed_reward": "with --resume: files of functions may have changed",
    },
)


def main(argv: list[str]) -> None:
    """Trains; raises ValueError or OSError for bad input, and exits with 130 or 143 after SIGINT or SIGTERM."""
    _check_resume_has_settings(argv)
    config, flags = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.hosts.join import joined
    from qlora_jax.hosts.launchers import find_place
    from qlora_jax.terminal.console import Console
    from qlora_jax.training.run import dry_run, train

    runtime.start()
    run = Path(config.output)
    settings = {name: name in flags for name in ("resume", "oversized", "accept_changed_reward")}
    hosts = config.hosts
    place = find_place(hosts.launcher, hosts.coordinator, hosts.processes, hosts.process)
    devices = None if isinstance(hosts.devices, str) else hosts.devices
    with joined(place, run=run, devices=devices, heartbeat=hosts.heartbeat, report=report_error) as watchdog:
        console = Console(quiet=not watchdog.group.is_first)
        if "dry_run" in flags:
            return dry_run(config, run, **settings, console=console, group=watchdog.group)
        trained = train(config, run, **settings, console=console, watchdog=watchdog)
    if not trained.finished:  # it is saved, and can be resumed
        sys.exit(SIGNALLED + trained.signal)


def _check_resume_has_settings(argv: list[str]) -> None:
    """Raises ValueError for `--resume` without settings: they are not read from the output folder implicitly."""
    words = [part for word in argv for part in word.split("=", 1)]
    if "--resume" in words and not {"--config", "--model", "--model.path", "--help", "-h"} & set(words):
        run = Path(dict(itertools.pairwise(words)).get("--output", "RUN"))
        raise ValueError(
            "--resume: the run's settings are missing. Give the configuration in its folder:\n"
            f"  {COMMAND.prog} --config {shlex.quote(str(run / 'config.yaml'))} --resume"
        )


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
