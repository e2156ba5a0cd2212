"""Crashes the system after every file operation of a run: no acknowledged checkpoint or record may be lost.

    python -m scripts.campaign.crash_states --cases 8 --seed 0 --output DIR [--kinds evaluated ...]

strace logs a run that is killed before its third checkpoint is written, and resumed. A case replays every prefix of the
log with one kind of loss: 0, data and names that were not synced; 1, data; 2, data, with zeros in its place; 3, none;
from 4, one of these for each file and folder. Each state that differs from those before it is opened as a resumed run
does: it must find the newest checkpoint whose save had returned, or a newer one, and all records that this one counts.
Some states per case are resumed to the end, and must equal an uninterrupted run to the bit.
"""

import dataclasses
import functools
import os
import pickle
import random
import shutil
import subprocess
import sys
import unittest.mock
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from qlora_jax import train
from qlora_jax.config import read_config, run_main
from qlora_jax.io.run_folder.checkpoint import (
    CHECKPOINT_FOLDER,
    CheckpointError,
    Checkpoints,
    LockedCheckpoints,
    saved_steps,
)
from qlora_jax.io.run_folder.checkpoint_reader import PARTS
from qlora_jax.runtime import CACHE_VARIABLE
from qlora_jax.training.metrics.metrics_file import MetricsFile
from qlora_jax.training.resume import RECORDS
from scripts.campaign.command import ROOT, Campaign, main_of
from scripts.campaign.commands import run_command
from scripts.campaign.file_log import CALLS, Content, Disk, Event, Node, left, read_log
from scripts.campaign.file_tasks import must_succeed
from scripts.campaign.isolation import CaseRunner, Limits
from scripts.campaign.kills import EVALUATED, VARIANTS
from scripts.campaign.ledger import Case, Verdict
from scripts.campaign.run_results import CACHE, CONFIG, DIGEST, TinyRun, forked, moved, run_digest, write_settings

LIMITS = Limits(wall_seconds=7200.0, cases=20)
RUN, ACKNOWLEDGED, EVENTS, LOG = "run", "acknowledged-", "events.pickle", "strace.txt"
KILLED, RESUMED = 3, 3  # the step whose first checkpoint is not written; the number of states that are resumed
LOSSES = NAMES_AND_DATA, DATA, ZEROS, NOTHING = range(4)
UNFINISHED = ".orbax-checkpoint-tmp/"  # in paths of a checkpoint without its name, which no reader opens
SHORT = dict(steps=5, keep=1)
SAMPLED = EVALUATED["train"] | SHORT | dict(samples="prompts.txt", sample_tokens=4)
KINDS: Mapping[str, TinyRun] = {
    "plain": TinyRun(sections={"train": SHORT}),
    "evaluated": TinyRun(sections=EVALUATED | {"train": SAMPLED, "lora": dict(init="pissa")}),
    "classification": dataclasses.replace(VARIANTS["classification"], sections={"train": SHORT}),
}


class State(NamedTuple):
    """The files (and folders, None) that a crash leaves, by path.

    Fields:
      after: number of events before the crash.
      acknowledged: the newest step whose save had returned; 0 for none.
    """

    after: int
    acknowledged: int
    files: dict[str, bytes | None]


def _survives(node: Node, losses: Sequence[int], chance: random.Random) -> Content:
    loss = chance.choice(losses)
    if loss == NOTHING or (isinstance(node.now, dict) and loss != NAMES_AND_DATA):
        return node.now
    if isinstance(node.now, bytes) and isinstance(node.synced, bytes) and loss == ZEROS:
        return node.synced.ljust(len(node.now), b"\0")
    return node.synced


def states(events: Sequence[Event], case: Case) -> Iterator[State]:
    """Yields the states of a case that differ from those before them in a file that a resumed run opens."""
    disk, acknowledged, seen = Disk(), 0, set()
    losses = [case.number] if case.number in LOSSES else LOSSES
    for after, event in enumerate(events, 1):
        disk.apply(event)
        if event.paths[0].startswith(ACKNOWLEDGED):
            acknowledged = int(event.paths[0].removeprefix(ACKNOWLEDGED))
        survives = functools.partial(_survives, losses=losses, chance=random.Random(f"{case}/{after}"))
        files = dict(left(disk.root, survives))
        opened = acknowledged, frozenset(item for item in files.items() if UNFINISHED not in item[0])
        if opened not in seen:
            seen.add(opened)
            yield State(after, acknowledged, files)


def write_files(files: Mapping[str, bytes | None], folder: Path) -> None:
    """Writes files into a folder, which it empties first."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():  # a folder comes before its files
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def problem_of(run: Path, acknowledged: int, like: Sequence[PyTree], records: Mapping[str, bytes]) -> str | None:
    """Opens a run like one that is resumed; returns what is lost.

    Args:
      acknowledged: step of the checkpoint that must be there, if no newer one is; 0 for none.
      like: shapes and types of the arrays in PARTS.
      records: content of the files of records at the end of the run.
    """
    try:
        with Checkpoints(run, keep=1) as checkpoints, warnings.catch_warnings(action="ignore"):
            state = checkpoints.restore(like[0], like[1]).state
    except CheckpointError as error:
        return f"checkpoint | of step {acknowledged}: {error}" if acknowledged else None
    if state["step"] < acknowledged:
        return f"checkpoint | of step {acknowledged}: found {state['step']}"
    for name, saved in state[RECORDS].items():
        with warnings.catch_warnings(record=True, action="always") as caught:
            MetricsFile(run / name, state["step"], saved=saved)
        found = (run / name).read_bytes() if (run / name).exists() else b""
        if caught or found.count(b"\n") != saved["lines"] or not records.get(name, b"").startswith(found):
            return f"records | {name}: {[str(warning.message) for warning in caught]}"
    return None


def check_states(events: Sequence[Event], case: Case, folder: Path) -> tuple[Verdict, list[State]]:
    """Opens the states of a case; returns the verdict, and some states to resume."""
    write_files(_at_end(events), folder)
    run, chance = folder / RUN, random.Random(f"{case}")
    newest = run / CHECKPOINT_FOLDER / str(saved_steps(run)[-1])
    arrays = [ocp.StandardCheckpointer().restore(newest.absolute() / part) for part in PARTS]
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
    records = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    found = list(states(events, case))
    for state in found:
        write_files(state.files, folder)
        if problem := problem_of(run, state.acknowledged, like, records):
            return Verdict("lost", f"{problem} | after {events[state.after - 1][:3]}"), []
    acknowledged = [state for state in found if state.acknowledged]
    resumed = chance.sample(acknowledged, min(RESUMED, len(acknowledged)))
    return Verdict("kept", f"| {len(events)} crashes, {len(found)} states, {len(resumed)} resumed"), resumed


def _at_end(events: Sequence[Event]) -> dict[str, bytes | None]:
    disk = Disk()
    for event in events:
        disk.apply(event)
    return dict(left(disk.root, lambda node: node.now))


@dataclasses.dataclass(frozen=True)
class CrashedRun:
    """Crashes of a run with some settings."""

    run: TinyRun
    shared: str | None = None

    def write_sound(self, folder: Path) -> None:
        """Writes the events of a run, and the digest of an uninterrupted one."""
        whole, traced = folder / "whole", folder / "traced"
        words = write_settings(moved(self.run.write(folder, whole), folder, whole), folder / CONFIG)
        must_succeed(run_command(words, folder / "printed.txt", folder / CACHE))
        (folder / DIGEST).write_text(run_digest(whole))
        traced.mkdir()
        write_settings(moved(read_config(folder / CONFIG), folder, traced / RUN), folder / CONFIG)
        for more in ([], ["--resume"]):
            _trace(folder, traced, more)
        with (folder / LOG).open(encoding="utf-8") as lines:
            events = read_log(lines, str(traced))
        there = {str(path.relative_to(traced)): path for path in traced.glob(f"{RUN}/**/*")}
        replayed = {path: content for path, content in _at_end(events).items() if path.startswith(f"{RUN}/")}
        if replayed != {path: file.read_bytes() if file.is_file() else None for path, file in there.items()}:
            raise RuntimeError(
                f"the log of {traced} misses operations. Replay more calls in scripts/campaign/file_log.py"
            )
        (folder / EVENTS).write_bytes(pickle.dumps(events))

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Returns the function that runs a case."""
        events, expected = pickle.loads((sound / EVENTS).read_bytes()), (sound / DIGEST).read_text()
        folder, printed = scratch / "case", scratch / "printed.txt"
        words = write_settings(moved(read_config(sound / CONFIG), sound, folder / RUN), scratch / CONFIG)

        def run(case: Case) -> Verdict:
            verdict, resumed = forked(lambda: check_states(events, case, folder), (Verdict("crash"), []))
            for state in resumed:
                write_files(state.files, folder)
                done = run_command([*words, "--resume"], printed, sound / CACHE)
                if done.status != 0:
                    return Verdict(
                        "lost", f"status {done.status} | resumed after event {state.after}: {done.last_line}"
                    )
                if run_digest(folder / RUN) != expected:
                    return Verdict("differs", f"| resumed after event {state.after}")
            return verdict

        return run


def _trace(folder: Path, traced: Path, more: Sequence[str]) -> None:
    """Appends the log of a run that ends when the checkpoint of KILLED is due, or of a resumed one."""
    program = "from scripts.campaign.crash_states import train_traced; train_traced()"
    options = ["-f", "-A", "--seccomp-bpf", "-y", "-s", str(1 << 28), "-e", f"trace={','.join(CALLS)}"]
    words = [sys.executable, "-c", program, str(traced), "--config", str(folder / CONFIG), *more]
    environment = os.environ | {CACHE_VARIABLE: str(folder / CACHE)}
    subprocess.run(["strace", *options, "-o", str(folder / LOG), *words], cwd=ROOT, env=environment, check=True)


def train_traced() -> None:
    """Trains as `sys.argv` says; creates a file in the first folder after a save, and exits before that of KILLED."""
    traced, *words = sys.argv[1:]
    save = LockedCheckpoints.save

    def acknowledge(self: LockedCheckpoints, step: int, *parts: Any) -> None:
        if step == KILLED and "--resume" not in words:
            os._exit(0)
        save(self, step, *parts)
        Path(traced, f"{ACKNOWLEDGED}{step}").touch()

    with unittest.mock.patch.object(LockedCheckpoints, "save", acknowledge):
        run_main(train.main, words)


def campaign() -> Campaign:
    """Returns the campaign."""
    return Campaign("crash_states", {name: CrashedRun(run) for name, run in KINDS.items()}, LIMITS)


if __name__ == "__main__":
    main_of(campaign, __doc__)
