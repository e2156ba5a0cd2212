"""Crashes of the system: an fsync that a run lacks is noticed, and logs of strace are read."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from qlora_jax.io.run_folder.checkpoint import Checkpoints
from qlora_jax.training.metrics.metrics_file import MetricsFile
from scripts.campaign.crash_states import ACKNOWLEDGED, check_states
from scripts.campaign.file_log import Event, read_log
from scripts.campaign.ledger import Case
from tests.marks import first_always

LOG = r"""7  mkdir("/t/run", 0777) = 0
7  openat(AT_FDCWD</w>, "/t/run/a", O_WRONLY|O_CREAT|O_CLOEXEC, 0666 <unfinished ...>
8  openat(AT_FDCWD</w>, "/elsewhere", O_RDONLY) = 4</elsewhere>
7  <... openat resumed>) = 3</t/run/a>
7  write(3</t/run/a>, "1 < 2) = 3\n\0\377", 13) = 13
7  fsync(3</t/run/a> <unfinished ...>
8  writev(5</t/run/b>, [{iov_base="one", iov_len=3}, {iov_base="two", iov_len=3}], 2) = 6
9  unlinkat(6</t/run>, "c", 0) = 0
7  <... fsync resumed>) = 0
7  rename("/t/run/a", "/t/run/\303\244") = 0
7  unlink("/t/run/none") = -1 ENOENT (No such file or directory)
7  fsync(3</t>) = 0
7  pwrite64(4</t/run/gone> (deleted), "x", 1, 0) = 1
7  +++ exited with 0 +++
"""


def test_a_log_is_read_with_the_ends_of_syncs():
    events = read_log(LOG.splitlines(keepends=True), "/t")
    assert [(event.name, event.paths) for event in events] == [
        ("mkdir", ["run"]),
        ("openat", ["run/a"]),
        ("write", ["run/a"]),
        ("fsync", ["run/a"]),
        ("writev", ["run/b"]),
        ("unlinkat", ["run/c"]),
        ("synced", ["run/a"]),
        ("rename", ["run/a", "run/ä"]),
        ("fsync", [""]),
        ("synced", [""]),
    ]
    assert events[2].data == b"1 < 2) = 3\n\0\xff" and events[4].data == b"onetwo"
    assert events[3].number == events[6].number


class Log(list[Event]):
    """The events of a run that does what `qlora_jax` does."""

    def add(self, name: str, *paths: str, data: bytes = b"", arguments: str = "") -> None:
        self.append(Event(name, len(self), list(paths), data, arguments))

    def sync(self, path: str) -> None:
        self.add("fsync", path)
        self.append(self[-1]._replace(name="synced"))

    def create(self, path: str, data: bytes) -> None:
        self.add("openat", path, arguments="O_CREAT")
        self.add("write", path, data=data)


def events_of(folder: Path) -> Log:
    """Trains nothing, but writes two checkpoints with their records; returns the events."""
    run, log = folder / "run", Log()
    log.add("mkdir", "run")
    log.sync("")
    log.add("mkdir", "run/checkpoints")
    log.sync("run")
    log.add("openat", "run/metrics.jsonl", arguments="O_CREAT")
    log.sync("run")
    run.mkdir()
    with MetricsFile(run / "metrics.jsonl", 0) as metrics:
        for step in (1, 2):
            size = (run / "metrics.jsonl").stat().st_size if step > 1 else 0
            metrics.write({"step": step, "eval_loss": step / 7})
            log.add("write", "run/metrics.jsonl", data=(run / "metrics.jsonl").read_bytes()[size:])
            records = {"metrics.jsonl": metrics.sync()}
            log.sync("run/metrics.jsonl")
            with Checkpoints(run, keep=2) as checkpoints:
                arrays = {"q_proj": {"lora_a": jnp.full((4, 2), step, jnp.float32)}}
                checkpoints.save(step, arrays, {"mu": arrays}, {"step": step, "records": records})
            save(log, run / "checkpoints" / str(step))
    return log


def save(log: Log, checkpoint: Path) -> None:
    """Adds the events of a save: orbax's, then ours."""
    folder, name = "run/checkpoints", checkpoint.name
    paths = [".", *sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*"))]
    for path in paths:
        place = f"{folder}/{name}.orbax-checkpoint-tmp/{path}".removesuffix("/.")
        if (checkpoint / path).is_dir():
            log.add("mkdir", place)
        else:
            log.create(place, (checkpoint / path).read_bytes())
    log.add("rename", f"{folder}/{name}.orbax-checkpoint-tmp", f"{folder}/{name}")
    for path in paths:
        log.sync(f"{folder}/{name}/{path}".removesuffix("/."))
    log.sync(folder)
    log.create(f"{ACKNOWLEDGED}{name}", b"")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return events_of(tmp_path_factory.mktemp("traced"))


@pytest.mark.parametrize("number", first_always([0, 1, 2, 3, 4]))
def test_a_run_that_syncs_loses_nothing(events: Log, number: int, tmp_path: Path):
    verdict, resumed = check_states(events, Case("planted", 0, number), tmp_path / "case")
    assert verdict.outcome == "kept", verdict
    assert resumed and all(state.acknowledged for state in resumed)


FAULTS: dict[str, tuple[Callable[[str], bool], str]] = {
    "the name of the run": (lambda path: path == "", "checkpoint"),
    "names in the run": (lambda path: path == "run", "checkpoint"),
    "names of checkpoints": (lambda path: path == "run/checkpoints", "checkpoint"),
    "names in a checkpoint": (lambda path: path.endswith("/lora"), "checkpoint"),
    "data of checkpoints": (lambda path: path.endswith("/metadata"), "checkpoint"),
    "records": (lambda path: path == "run/metrics.jsonl", "records"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_without_a_sync_is_noticed(events: Log, fault: str, tmp_path: Path):
    left_out, lost = FAULTS[fault]
    faulty = [event for event in events if event.name not in ("fsync", "synced") or not left_out(event.paths[0])]
    verdict, _ = check_states(faulty, Case("planted", 0, 0), tmp_path / "case")
    assert verdict.outcome == "lost" and verdict.detail.startswith(lost), verdict


def test_a_new_file_whose_name_is_not_synced_is_noticed(events: Log, tmp_path: Path):
    """The name of the records' file is synced before the first record, not by luck with another name."""
    created = next(place for place, event in enumerate(events) if event.paths == ["run/metrics.jsonl"])
    faulty = [*events[: created + 1], *events[created + 3 :]]
    verdict, _ = check_states(faulty, Case("planted", 0, 0), tmp_path / "case")
    assert verdict.outcome == "lost" and verdict.detail.startswith("records"), verdict
