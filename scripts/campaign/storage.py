"""Fills, write-protects, removes and damages the folders of commands: no result may be lost or wrong without a word.

    python -m scripts.campaign.storage --cases 100 --seed 0 --output DIR [--kinds full_train full_export_gguf ...]

Kinds that begin with "full", "read_only" or "gone" run one command on a disk that is full after a random number of
bytes, turns read-only at a random moment, or whose folder is removed or renamed. A command must end with its result, or
with one error; with space, it then gives the same result as on a large disk. `damaged_*` flips bits of, truncates or
removes a file of a run, and then uses the run. Mounting disks requires root.
"""

import dataclasses
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from qlora_jax.config import read_config
from scripts.campaign.command import Campaign, main_of
from scripts.campaign.commands import Finished, Running, run_command
from scripts.campaign.disk import break_disk, image_disk, repair_disk, resize, small_disk
from scripts.campaign.file_tasks import (
    BASE_RUN,
    HALF_RUN,
    HEAD,
    RUNS,
    SOUND_FILES,
    TASKS,
    FileTask,
    files_digest,
    must_succeed,
)
from scripts.campaign.isolation import CaseRunner, Limits
from scripts.campaign.ledger import Case, Verdict
from scripts.campaign.mutations import damage_bytes
from scripts.campaign.run_results import CACHE, CONFIG, moved, run_digest, write_settings

LIMITS = Limits(wall_seconds=900.0, cases=50)
LARGE = 256 << 20
PAGE = 4096  # a file system in memory allocates pages
TURNED = ("train", "resume", "export_hf", "evaluate", "arena", "variance")  # read-only
REMOVED = ("train", "resume", "arena", "variance")
DISK = "disk"
LOST = "Lost: "  # in the warning of a resumed run
OUTPUT = "output"  # the command writes it, on the disk


@dataclasses.dataclass(frozen=True)
class DiskKind:
    """A command, and what happens to its disk.

    Attributes:
      disk: makes a disk of some size.
      restore: gives a disk its space, or makes it writable again.
    """

    task: FileTask
    happens: Callable[["DiskCase"], Verdict]
    disk: Callable[[Path, int], AbstractContextManager[Path]] = small_disk
    restore: Callable[[Path], None] = lambda disk: resize(disk, LARGE)

    @property
    def shared(self) -> str:
        """Name of the sound files."""
        return self.task.sound

    def write_sound(self, folder: Path) -> None:
        """Writes what the command reads."""
        SOUND_FILES[self.shared](folder)

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Runs the command undisturbed, and returns the function that runs a case."""
        with self.disk(scratch / DISK, LARGE) as disk:
            output = disk / OUTPUT
            self.task.before(sound, output)
            began = time.monotonic()
            must_succeed(run_command(self.task.words(sound, output), scratch / "printed.txt", sound / CACHE))
            seconds, expected, needed = time.monotonic() - began, self.task.result(output), _used(disk)

        def run(case: Case) -> Verdict:
            chance = random.Random(f"{case.seed}/{case.kind}/{case.number}")
            with self.disk(scratch / DISK, LARGE) as disk:
                return self.happens(DiskCase(self.task, chance, sound, disk, self.restore, expected, needed, seconds))

        return run


def _used(disk: Path) -> int:
    found = shutil.disk_usage(disk)
    return found.used


@dataclasses.dataclass(frozen=True)
class DiskCase:
    """One case on a disk.

    Attributes:
      expected: digest of the undisturbed result.
      needed: bytes that the undisturbed command leaves on the disk.
      seconds: duration of the undisturbed command.
    """

    task: FileTask
    chance: random.Random
    sound: Path
    disk: Path
    restore: Callable[[Path], None]
    expected: str
    needed: int
    seconds: float

    @property
    def output(self) -> Path:
        """Path of the command's output."""
        return self.disk / OUTPUT

    @property
    def printed(self) -> Path:
        """Path of what the command prints; not on the disk."""
        return self.disk.parent / "printed.txt"

    def prepare(self) -> list[str]:
        """Writes what has to be there, and returns the words of the command."""
        self.task.before(self.sound, self.output)
        return self.task.words(self.sound, self.output)

    def run(self, words: Sequence[str]) -> Finished:
        """Runs a command to its end."""
        return run_command(words, self.printed, self.sound / CACHE)

    def judge(self, done: Finished, cause: str) -> Verdict:
        """Judges the end of the disturbed command; after an error, repeats it with space."""
        if done.status == 0:
            return Verdict("same" if self._result() == self.expected else "silent", f"exit status 0 | {cause}")
        if not done.is_error:
            return Verdict("traceback", f"status {done.status}: {done.last_line} | {cause}")
        if str(self.disk) not in done.last_line:
            return Verdict("unclear", f"names no file: {done.last_line} | {cause}")
        self.restore(self.disk)
        again = self.run(self.task.repeat(self.sound, self.output))
        if again.status != 0:
            return Verdict("lost", f"then status {again.status}: {again.last_line} | {cause}; {done.last_line}")
        if self._result() != self.expected:
            return Verdict("lost", f"another result | {cause}; {done.last_line}")
        if done.has_traceback:
            return Verdict("traceback", f"printed before the error, then recovered | {cause}; {done.last_line}")
        return Verdict("recovered", f"| {cause}; {done.last_line}")

    def _result(self) -> str:
        try:
            return self.task.result(self.output)
        except (OSError, IndexError) as error:
            return f"unreadable: {error}"


def fill(case: DiskCase) -> Verdict:
    """Runs the command on a disk with room for a part of its result."""
    words = case.prepare()
    (case.disk / "filler").write_bytes(bytes(PAGE))  # a size of 0 would be none
    size = _used(case.disk) + case.chance.randrange(0, case.needed + 4 * PAGE, PAGE)
    resize(case.disk, size)
    return case.judge(case.run(words), f"{size} of {case.needed} bytes")


def write_protect(case: DiskCase) -> Verdict:
    """Turns the disk read-only before the command starts, or at a random moment."""
    words = case.prepare()
    os.sync()  # a run to resume is on the disk before that breaks
    moment = case.chance.choice((0.0, case.chance.uniform(0.0, case.seconds)))
    if moment == 0.0:
        break_disk(case.disk)
    process = Running(words, case.printed, case.sound / CACHE)
    deadline = time.monotonic() + moment
    if moment > 0.0 and process.wait_until(lambda: time.monotonic() > deadline):
        break_disk(case.disk)
    cause = "ended before" if process.ended() and moment > 0.0 else f"read-only after {moment:.2f} s"
    return case.judge(process.wait(), cause)


def remove(case: DiskCase) -> Verdict:
    """Removes or renames the output at a random moment: the command must not write another one in its place."""
    words = case.prepare()
    process = Running(words, case.printed, case.sound / CACHE)
    process.wait_until(case.output.exists)
    deadline, renamed = time.monotonic() + case.chance.uniform(0.0, case.seconds / 2), case.chance.random() < 0.5
    if not process.wait_until(lambda: time.monotonic() > deadline):
        return case.judge(process.wait(), "ended before")
    cause, elsewhere = "renamed" if renamed else "removed", case.disk / "elsewhere"
    if renamed:
        case.output.rename(elsewhere)
    else:
        shutil.rmtree(case.output, ignore_errors=True)
    done = process.wait()
    if done.status != 0 and not done.is_error:
        return Verdict("traceback", f"status {done.status}: {done.last_line} | {cause}")
    if case.output.exists() and any(path.is_file() for path in case.output.rglob("*")):
        return Verdict("silent", f"made anew, status {done.status} | {cause}")
    if done.status != 0:
        return Verdict("refused", f"| {cause}; {done.last_line}")
    same = renamed and case.task.result(elsewhere) == case.expected
    return Verdict("same" if same else "silent", f"exit status 0 | {cause}")


@dataclasses.dataclass(frozen=True)
class DamagedRun:
    """A command that uses a folder, such as a run's, with a damaged file.

    Attributes:
      write: writes the sound folder, given the sound files and its path.
      words: returns the command's words, given the sound files, the folder and the output.
      result: returns a digest of the result, given the folder and the output.
      records: returns a digest of the folder's records; some may be lost, with a warning.
      shared: name of the sound files.
    """

    write: Callable[[Path, Path], None]
    words: Callable[[Path, Path, Path], list[str]]
    result: Callable[[Path, Path], str]
    records: Callable[[Path], str] = lambda folder: ""
    shared: str = RUNS

    def write_sound(self, folder: Path) -> None:
        """Writes what the command reads."""
        SOUND_FILES[self.shared](folder)

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Uses the sound folder, and returns the function that runs a case."""
        run, copy, output, printed = (scratch / name for name in ("run", "copy", OUTPUT, "printed.txt"))

        def use() -> Finished:
            return run_command(self.words(sound, run, output), printed, sound / CACHE)

        self.write(sound, run)
        shutil.copytree(run, copy)
        must_succeed(use())
        expected, records = self.result(run, output), self.records(run)

        def run_case(case: Case) -> Verdict:
            chance = random.Random(f"{case.seed}/{case.kind}/{case.number}")
            for path in (run, output):
                shutil.rmtree(path, ignore_errors=True)
            output.unlink(missing_ok=True)
            shutil.copytree(copy, run)
            damage = _damage(chance, run)
            done = use()
            if done.status != 0 and (not done.is_error or done.has_traceback):
                return Verdict("traceback", f"status {done.status}: {done.last_line} | {damage}")
            if done.status != 0:
                named = str(run) in done.last_line
                return Verdict("refused" if named else "unclear", f"| {damage}; {done.last_line}")
            same, outcome = self.result(run, output) == expected, "silent"
            if same:
                outcome = "same" if self.records(run) == records else "warned" if LOST in done.output else outcome
            return Verdict(outcome, f"{damage.partition(':')[0]} | {damage}")

        return run_case


def _damage(chance: random.Random, run: Path) -> str:
    """Damages the bytes of a file, truncates it to nothing, or removes it."""
    path = chance.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    name, way = path.relative_to(run), chance.random()
    if way < 0.1:
        path.unlink()
        return f"{name}: removed"
    content = b"" if way < 0.2 else damage_bytes(chance, path.read_bytes())
    path.write_bytes(content)
    return f"{name}: {len(content)} bytes"


def _resumed_words(sound: Path, run: Path, output: Path) -> list[str]:
    return [*write_settings(moved(read_config(sound / CONFIG), sound, run), output.with_suffix(".yaml")), "--resume"]


def _copied(name: str) -> Callable[[Path, Path], None]:
    """Returns the function that copies one of the sound runs."""

    def copy(sound: Path, run: Path) -> None:
        shutil.copytree(sound / name, run)

    return copy


def _using(command: str) -> Callable[[Path, Path, Path], list[str]]:
    """Returns the words of a command with another run than BASE_RUN."""
    return lambda sound, run, output: [
        str(run) if word == str(sound / BASE_RUN) else word for word in TASKS[command].words(sound, output)
    ]


def _written(run: Path, output: Path) -> str:
    return files_digest(output)


def _arrays(run: Path, output: Path) -> str:
    return run_digest(run, records=False)


def _repeated(command: str) -> DamagedRun:
    """Returns the kind that repeats a command in the folder that it wrote."""

    def words(sound: Path, folder: Path, output: Path) -> list[str]:
        return TASKS[command].words(sound, folder)

    def write(sound: Path, folder: Path) -> None:
        must_succeed(run_command(words(sound, folder, folder), folder.with_name("printed.txt"), sound / CACHE))

    return DamagedRun(write, words, lambda folder, output: files_digest(folder))


DAMAGED = {
    "damaged_resume": DamagedRun(_copied(HALF_RUN), _resumed_words, _arrays, run_digest),
    "damaged_generate": DamagedRun(_copied(BASE_RUN), _using("generate"), _written),
    "damaged_predict": DamagedRun(_copied(BASE_RUN), _using("predict"), _written, shared=HEAD),
    "damaged_export": DamagedRun(_copied(BASE_RUN), _using("export_peft"), _written),
    "damaged_arena": _repeated("arena"),
    "damaged_variance": _repeated("variance"),
}


def campaign() -> Campaign:
    """Returns the campaign."""
    kinds = {f"full_{name}": DiskKind(task, fill) for name, task in TASKS.items()}
    kinds |= {f"read_only_{name}": DiskKind(TASKS[name], write_protect, image_disk, repair_disk) for name in TURNED}
    kinds |= {f"gone_{name}": DiskKind(TASKS[name], remove) for name in REMOVED}
    return Campaign("storage", kinds | DAMAGED, LIMITS)


if __name__ == "__main__":
    main_of(campaign, __doc__)
