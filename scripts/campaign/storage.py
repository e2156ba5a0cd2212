"""Fills, write-protects, removes and damages the folders of commands: no result may be lost or wrong without a word.

    python -m scripts.campaign.storage --cases 100 --seed 0 --output DIR [--kinds full_train full_export_gguf ...]

Kinds that begin with "full", "read_only" or "gone" run one command on a disk that is full after a random number of
bytes, turns read-only at a random moment, or whose folder is removed or renamed. A command must end with its result, or
with one error; with space, it then gives the same result as on a large disk. `damaged_*` flips bits of, truncates or
removes a file of a run, and then uses the run. Mounting disks requires root.
"""

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qlora_jax.config import read_config
from qlora_jax.inference.result_cache import digest
from qlora_jax.io.run_folder.checkpoint import saved_steps
from scripts.campaign.command import Campaign, main_of
from scripts.campaign.commands import Finished, Running, run_command
from scripts.campaign.disk import make_read_only, resize, small_disk
from scripts.campaign.isolation import CaseRunner, Limits
from scripts.campaign.ledger import Case, Verdict
from scripts.campaign.mutations import damage_bytes
from scripts.campaign.run_results import CACHE, CONFIG, MODEL, PROMPTS, TinyRun, moved, run_digest, write_settings

LIMITS = Limits(wall_seconds=900.0, cases=50)
LARGE = 256 << 20
PAGE = 4096  # a file system in memory allocates pages
BASE_RUN, HALF_RUN = "base_run", "half_run"  # a finished run, and one that stopped half-way
DISK = "disk"
OUTPUT = "output"  # the command writes it, on the disk
TEXTS = {".json", ".jsonl", ".md", ".yaml", ".html"}


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A command that writes.

    Attributes:
      words: returns its words, given the folder of sound files and the output on the disk.
      result: returns a digest of what it wrote.
      before: writes what has to be on the disk before, such as a run to resume.
      again: returns the words that repeat it after an error, given the sound files and the output.
    """

    words: Callable[[Path, Path], list[str]]
    result: Callable[[Path], str]
    before: Callable[[Path, Path], None] = lambda sound, output: None
    again: Callable[[Path, Path], list[str]] | None = None

    def repeat(self, sound: Path, output: Path) -> list[str]:
        """Returns the words that repeat the command after an error."""
        return (self.again or self.words)(sound, output)


def _train_words(sound: Path, output: Path) -> list[str]:
    config = moved(read_config(sound / CONFIG), sound, output)
    return write_settings(config, output.parent.parent / f"{output.name}.yaml")


def _train_again(sound: Path, output: Path) -> list[str]:
    if saved_steps(output):
        return _resume_words(sound, output)
    shutil.rmtree(output, ignore_errors=True)
    return _train_words(sound, output)


def _resume_words(sound: Path, output: Path) -> list[str]:
    return [*_train_words(sound, output), "--resume"]


def _copy_half(sound: Path, output: Path) -> None:
    shutil.copytree(sound / HALF_RUN, output)


def files_digest(output: Path) -> str:
    """Returns a digest of the files in a folder; texts may name the folder."""
    files = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]
    return digest([item for path in files for item in (str(path.relative_to(output)), _content(path, output))])


def _content(path: Path, output: Path) -> bytes:
    content = path.read_bytes()
    return content.replace(str(output).encode(), b"OUTPUT") if path.suffix in TEXTS else content


def _export(form: str, *more: str) -> FileTask:
    return FileTask(
        lambda sound, output: ["export", *_model_of(sound), "--format", form, "--output", str(output), *more],
        files_digest,
    )


def _model_of(sound: Path) -> list[str]:
    return ["--run", str(sound / BASE_RUN), "--model", str(sound / MODEL)]


def _generate_words(sound: Path, output: Path) -> list[str]:
    prompts = ["--prompts", str(sound / PROMPTS), "--max_new_tokens", "8"]
    return ["generate", *_model_of(sound), *prompts, "--output", str(output)]


def _evaluate_words(sound: Path, output: Path) -> list[str]:
    output.mkdir(exist_ok=True)
    files = ["--rows", str(sound / "few.jsonl"), "--json", str(output / "scores.json"), "--keep", str(output / "kept")]
    return ["evaluate", *_model_of(sound), *files]


def _quantize_words(sound: Path, output: Path) -> list[str]:
    return ["quantize", "--model", str(sound / MODEL), "--output", str(output)]


TASKS: Mapping[str, FileTask] = {
    "train": FileTask(_train_words, run_digest, again=_train_again),
    "resume": FileTask(_resume_words, run_digest, before=_copy_half),
    "generate": FileTask(_generate_words, files_digest),
    "evaluate": FileTask(_evaluate_words, files_digest),
    "export_peft": _export("peft", "--with_base"),
    "export_hf": _export("hf"),
    "export_gguf": _export("gguf"),
    "export_gguf_lora": _export("gguf-lora", "--with_base"),
    "quantize": FileTask(_quantize_words, files_digest),
}


def write_runs(folder: Path) -> None:
    """Writes a model, rows, a finished run and one that stopped half-way."""
    config = TinyRun(sections={"train": dict(save_every=2)}).write(folder, folder / BASE_RUN)
    _split_like_gpt2(folder / MODEL / "tokenizer.json")
    words = write_settings(config, folder / CONFIG)
    (folder / "few.jsonl").write_text("".join((folder / "rows.jsonl").read_text().splitlines(keepends=True)[:4]))
    _must(run_command(words, folder / "printed.txt", folder / CACHE))
    half = write_settings(dataclasses.replace(config, output=str(folder / HALF_RUN)), folder / "half.yaml")
    process = Running(half, folder / "printed.txt", folder / CACHE)
    process.wait_until(lambda: len(saved_steps(folder / HALF_RUN)) >= 2)
    process.send(9)
    process.wait()


def _split_like_gpt2(path: Path) -> None:
    """Changes a byte-level tokenizer to one that a GGUF file can describe."""
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = True
    path.write_text(json.dumps(tokenizer))


def _must(done: Finished) -> None:
    if done.status != 0:
        raise RuntimeError(f"a command failed on sound files:\n{done.output}")


@dataclasses.dataclass(frozen=True)
class DiskKind:
    """A command, and what happens to its disk."""

    task: FileTask
    happens: Callable[["DiskCase"], Verdict]
    shared: str | None = "runs"

    def write_sound(self, folder: Path) -> None:
        """Writes the runs, and measures the command on a large disk."""
        write_runs(folder)

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Runs the command undisturbed, and returns the function that runs a case."""
        with small_disk(scratch / DISK, LARGE) as disk:
            output = disk / OUTPUT
            self.task.before(sound, output)
            began = time.monotonic()
            _must(run_command(self.task.words(sound, output), scratch / "printed.txt", sound / CACHE))
            seconds, expected, needed = time.monotonic() - began, self.task.result(output), _used(disk)

        def run(case: Case) -> Verdict:
            chance = random.Random(f"{case.seed}/{case.kind}/{case.number}")
            with small_disk(scratch / DISK, LARGE) as disk:
                return self.happens(DiskCase(self.task, chance, sound, disk, expected, needed, seconds))

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
        resize(self.disk, LARGE)
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
    size = _used(case.disk) + case.chance.randrange(0, case.needed + 4 * PAGE, PAGE)
    resize(case.disk, max(size, PAGE))
    return case.judge(case.run(words), f"{size} of {case.needed} bytes")


def write_protect(case: DiskCase) -> Verdict:
    """Turns the disk read-only before the command starts, or at a random moment."""
    words = case.prepare()
    moment = case.chance.choice((0.0, case.chance.uniform(0.0, case.seconds)))
    if moment == 0.0:
        make_read_only(case.disk)
    process = Running(words, case.printed, case.sound / CACHE)
    deadline = time.monotonic() + moment
    done = process.wait_until(lambda: time.monotonic() > deadline and make_read_only(case.disk))
    return case.judge(process.wait(), f"read-only after {moment:.2f} s" if done else "ended before")


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
    if saved_steps(case.output):
        return Verdict("silent", f"made anew, status {done.status} | {cause}")
    if done.status != 0:
        return Verdict("refused", f"| {cause}; {done.last_line}")
    same = renamed and case.task.result(elsewhere) == case.expected
    return Verdict("same" if same else "silent", f"exit status 0 | {cause}")


@dataclasses.dataclass(frozen=True)
class DamagedRun:
    """A command that uses a run with a damaged file.

    Attributes:
      run: name of the sound run.
      words: returns the command's words, given the sound files, the run and the output.
      result: returns a digest of the result, given the run and the output.
    """

    run: str
    words: Callable[[Path, Path, Path], list[str]]
    result: Callable[[Path, Path], str]
    shared: str | None = "runs"

    def write_sound(self, folder: Path) -> None:
        """Writes the runs."""
        write_runs(folder)

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Uses the sound run, and returns the function that runs a case."""
        run, output, printed = scratch / "run", scratch / OUTPUT, scratch / "printed.txt"

        def use() -> Finished:
            return run_command(self.words(sound, run, output), printed, sound / CACHE)

        shutil.copytree(sound / self.run, run)
        _must(use())
        expected = self.result(run, output)

        def run_case(case: Case) -> Verdict:
            chance = random.Random(f"{case.seed}/{case.kind}/{case.number}")
            for path in (run, output):
                shutil.rmtree(path, ignore_errors=True)
            output.unlink(missing_ok=True)
            shutil.copytree(sound / self.run, run)
            damage = _damage(chance, run)
            done = use()
            if done.status != 0 and (not done.is_error or done.has_traceback):
                return Verdict("traceback", f"status {done.status}: {done.last_line} | {damage}")
            if done.status != 0:
                named = str(run) in done.last_line
                return Verdict("refused" if named else "unclear", f"| {damage}; {done.last_line}")
            same = self.result(run, output) == expected
            return Verdict("same" if same else "silent", f"{damage.partition(':')[0]} | {damage}")

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


def _using(command: Callable[[Path, Path], list[str]]) -> Callable[[Path, Path, Path], list[str]]:
    """Returns the words of a command with another run than BASE_RUN."""
    return lambda sound, run, output: [
        str(run) if word == str(sound / BASE_RUN) else word for word in command(sound, output)
    ]


def _written(run: Path, output: Path) -> str:
    return files_digest(output)


def _arrays(run: Path, output: Path) -> str:
    return run_digest(run, records=False)  # records have no separate digest


DAMAGED = {
    "damaged_resume": DamagedRun(HALF_RUN, _resumed_words, _arrays),
    "damaged_generate": DamagedRun(BASE_RUN, _using(_generate_words), _written),
    "damaged_export": DamagedRun(BASE_RUN, _using(TASKS["export_peft"].words), _written),
}


def campaign() -> Campaign:
    """Returns the campaign."""
    kinds = {f"full_{name}": DiskKind(task, fill) for name, task in TASKS.items()}
    kinds |= {f"read_only_{name}": DiskKind(TASKS[name], write_protect) for name in ("train", "resume", "export_hf")}
    kinds |= {f"gone_{name}": DiskKind(TASKS[name], remove) for name in ("train", "resume")}
    return Campaign("storage", kinds | DAMAGED, LIMITS)


if __name__ == "__main__":
    main_of(campaign, __doc__)
