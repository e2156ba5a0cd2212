"""Checks that the processes of a run make together, and their common stop. A run of one process skips all of it."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from qlora_jax.config import QUESTION_KINDS, Config, to_dict
from qlora_jax.hosts.group import Group
from qlora_jax.hosts.join import connect_groups
from qlora_jax.hosts.launchers import sees_first
from qlora_jax.hosts.watchdog import StopSignal, Watchdog
from qlora_jax.inference.result_cache import digest
from qlora_jax.io.run_folder.run_lock import RunLock, follow_lock
from qlora_jax.line_digests import LinesDigest
from qlora_jax.model_source import TensorEntry
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.run_spec import RunInputs

# Settings that may differ between processes: their place, and paths, whose content is compared.
QUESTION_FILES = tuple(f"questions.{kind}" for kind in (*QUESTION_KINDS, "shots"))
DATA_FILES = ("data.train", "data.eval", "data.cache", "train.samples", *QUESTION_FILES)
MAY_DIFFER = ("hosts", "output", "model.path", *DATA_FILES)
COMPARED_TENSORS, COMPARED_BYTES = 256, 4096  # tensors per model, and bytes per tensor
LIBRARIES = ("qlora-jax", "jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")
LOCKED = "the lock of the run folder"
FIX = (
    "Start all processes with the same command, versions and files, and with an output folder that all machines share. "
    "Separate runs under one launcher need --hosts.launcher off"
)


@contextlib.contextmanager
def lock_together(
    group: Group, first: contextlib.AbstractContextManager[RunLock], config: Config, run: Path
) -> Iterator[RunLock]:
    """Locks the run folder in process 0, and yields the lock in all processes once they agree on their settings.

    Args:
      first: locks the folder.

    Raises:
      Disagreement: settings, versions or devices differ, or the folder is not shared.
    """
    if group.processes == 1:
        with first as lock:
            yield lock
    elif group.is_first:
        with first as lock:
            agree_on_settings(group, config, run)
            group.barrier(LOCKED)  # an error here would delete the lock before the others have opened it
            yield lock
    else:
        agree_on_settings(group, config, run)
        with follow_lock(run) as lock:
            group.barrier(LOCKED)
            yield lock


def agree_on_settings(group: Group, config: Config, run: Path) -> None:
    sees = sees_first(group, run)  # first, because process 0 has the folder only from now on
    settings = _by_key(to_dict(config))
    values = {key: value for key, value in settings.items() if not _may_differ(key)}
    values |= {f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
    devices = jax.local_devices()
    values["local devices"] = f"{len(devices)} x {devices[0].device_kind}"
    values["output has a file of process 0"] = sees
    group.agree("settings", values, FIX)


def _may_differ(key: str) -> bool:
    """Returns True for the settings in MAY_DIFFER, and for those inside them."""
    return any(key == name or key.startswith(f"{name}.") for name in MAY_DIFFER)


def _by_key(settings: dict, prefix: str = "") -> dict[str, object]:
    """Returns nested settings by dotted key."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        found |= _by_key(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def agree_on_inputs(group: Group, inputs: RunInputs) -> None:
    """Checks that all processes have opened the same model and data.

    Raises:
      Disagreement: they have not.
    """
    if group.processes == 1:
        return
    tensors = {name: (entry.shape, entry.file_type) for name, entry in sorted(inputs.source.tensors.items())}
    values = {
        "model: names, shapes and types of its tensors": _digest(tensors),
        "model: first bytes of its tensors": _first_bytes(inputs.source.tensors),
        "model: features": _digest(dataclasses.asdict(inputs.model)),
        "data.train: rows and tokens": inputs.dataset.fingerprint,
        "data.eval: rows and tokens": None if inputs.dataset.eval is None else inputs.dataset.eval.digest,
        "train.samples: prompts": None if inputs.samples is None else digest(inputs.samples.ids),
    }
    for task in [] if inputs.questions is None else inputs.questions.tasks:
        values[f"questions.{task.name}: questions"] = digest([digest(row) for row in task.inputs])
    group.agree("inputs", values, FIX)


def _first_bytes(tensors: Mapping[str, TensorEntry]) -> str:
    """Returns a digest of the first bytes of some tensors, in which finetuned models of one kind differ.

    Models with many tensors are compared by a part of them, so that a network filesystem is not asked for each.
    """
    found = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())[:COMPARED_TENSORS]:
        for path, offset, nbytes in tensors[name].ranges_of(0, 1):
            with path.open("rb") as file:
                file.seek(offset)
                found.update(file.read(min(nbytes, COMPARED_BYTES)))
    return found.hexdigest()[:12]


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def all_of(group: Group, name: str, flag: bool) -> bool:
    """Returns True if the flag is true in all processes."""
    return all(text == str(True) for text in group.gather(name, str(flag)))


def connect_devices(group: Group, mesh: Mesh | None, seconds: float) -> None:
    """Connects the devices of several processes once all have compiled, within a limit for the slowest."""
    if group.processes > 1 and mesh is not None:
        connect_groups(group, mesh, seconds)


def stop_together(watchdog: Watchdog, asked: Callable[[], int], mesh: Mesh | None) -> Callable[[], int]:
    """Returns `stop()`, which gives all processes the number of a signal that has asked one to stop, or 0."""
    if watchdog.group.processes == 1 or mesh is None:
        return asked
    signal = StopSignal(asked, mesh)

    def stop() -> int:
        watchdog.passes("the last start of a step or of a part of an evaluation")
        return signal()

    return stop


def without_place(config: Config) -> Config:
    """Returns the settings without the place of this process, so that another number of processes can resume."""
    hosts = dataclasses.replace(config.hosts, coordinator=None, processes=None, process=None, devices="auto")
    return dataclasses.replace(config, hosts=hosts)


class SilentReporter:
    """A `TrainingReporter` that reports nothing: process 0 does."""

    def step(self, record: Record) -> None: ...

    def evaluation(self, record: Record) -> None: ...

    def evaluation_progress(self, text: str) -> None: ...

    def samples(self, records: list[Record]) -> None: ...

    def flush(self) -> Mapping[str, LinesDigest]:
        return {}
