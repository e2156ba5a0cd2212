"""Reads the parts of one checkpoint with orbax, and checks each against the digests that were saved with it.

STEP/lora, STEP/optimizer   arrays in orbax's format
STEP/state/metadata         JSON: the state, and under "digests" the digests of the state and of every array
"""

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from pydantic import NonNegativeInt, PositiveInt

from qlora_jax.io.digests import ArrayDigest, by_path, changes, json_digest, tree_digests
from qlora_jax.line_digests import LinesDigest
from qlora_jax.untrusted_json import JsonObject, MetadataError, check_value, read_json

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

# Functions import orbax, because that takes 0.2 s and 30 MB, and serving a base or a PEFT adapter does not need it.

# The processes that read or write a checkpoint together, as orbax wants to hear of them.
#
# Without their names orbax waits for them by a collective, which gives up after 30 s on CPUs, and for all devices.

SECONDS = 600


def named_processes() -> "ocp.options.MultiprocessingOptions":
    """Returns orbax's options with all processes by number; its defaults for one process."""
    import orbax.checkpoint as ocp

    count = jax.process_count()
    return ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)


def barrier(name: str) -> None:
    """Waits for all processes; each name is used once."""
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(name, processes=set(range(jax.process_count())), timeout=SECONDS)


# Silences the tracebacks that orbax' threads print about a save or read that failed.
#
# orbax raises the first error. Its threads log theirs as well, and it does not wait for its other reads and writes:
# they fail because their event loop is closed, or are freed, which Python prints.

# Loggers, and a part of their messages about reads and writes that failed or were abandoned.
LOGGED = {"absl": "_SignalingThread.run()", "asyncio": "exception was never retrieved"}
FREED = ("Event loop is closed", "Encountered error while reading array index", "cannot schedule new futures")


@functools.cache
def silence_threads() -> None:
    """Drops these messages for the rest of the process; all other messages of orbax and of Python remain."""
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_not_of_a_thread)
    hook = sys.unraisablehook

    # The argument's type exists only for type checkers.
    def print_other_errors(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(FREED):
            hook(unraisable)

    sys.unraisablehook = print_other_errors


def _is_not_of_a_thread(record: logging.LogRecord) -> bool:
    return LOGGED[record.name] not in str(record.msg)


LORA, OPTIMIZER, STATE = "lora", "optimizer", "state"  # the parts of a checkpoint
PARTS = (LORA, OPTIMIZER)  # the parts that contain arrays
DIGESTS = "digests"  # the key of the digests in the state
STATE_BYTES = 64 * 2**20  # at most; the order of windows and the digests grow with data and model
# Messages of tensorstore about the machine, after which a checkpoint may be sound.
NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "Too many open files", "Cannot allocate memory", "Input/output error")
SHOWN = 5  # differences that a message lists


class CheckpointError(OSError):
    """Raised if a checkpoint cannot be written or read; the message says why, and which checkpoint is still usable."""


class DamagedCheckpoint(CheckpointError):
    """Raised if a part of a checkpoint is missing, cannot be decoded, or is not what was saved."""

    def __init__(self, place: Path, step: str, problem: str):
        super().__init__(f"{place}: the checkpoint of step {step} is damaged: {problem}")
        self.step = step


class Digests(TypedDict):
    """The digests of a checkpoint's parts; that of the state includes the digests of the arrays."""

    state: str
    lora: dict[str, ArrayDigest]
    optimizer: dict[str, ArrayDigest]


class _Position(TypedDict):
    epoch: NonNegativeInt
    window: NotRequired[NonNegativeInt]
    index: NonNegativeInt


class _Best(TypedDict):
    loss: float | None
    step: NonNegativeInt
    since: NonNegativeInt


class _State(TypedDict, total=False):
    """The types of a state's values. Earlier versions lack some keys; training/resume.py says which are required."""

    step: NonNegativeInt
    position: _Position
    window_order: list[NonNegativeInt]
    best: _Best
    evaluation_due: bool
    fingerprint: str
    data_fingerprint: str
    config: JsonObject
    versions: dict[str, str]
    mesh: dict[str, PositiveInt]
    records: dict[str, LinesDigest]
    digests: Digests


def with_digests(state: Mapping[str, object], lora: PyTree, optimizer: PyTree) -> dict[str, object]:
    """Returns the state with the digests of all parts of its checkpoint."""
    arrays = {LORA: tree_digests(lora), OPTIMIZER: tree_digests(optimizer)}
    return {**state, DIGESTS: {STATE: json_digest([state, arrays]), **arrays}}


def read_state(checkpoint: Path) -> tuple[JsonObject, Digests | None]:
    """Reads (the state without the digests, the digests); None for a checkpoint from before there were digests.

    Raises:
      DamagedCheckpoint: the file is missing, cannot be decoded, or is not what was saved.
      CheckpointError: the file cannot be read.
    """
    _check_readable(checkpoint, STATE)
    path = checkpoint / STATE / "metadata"
    try:
        state = read_json(path, JsonObject, STATE_BYTES)
        digests = check_value(state, _State, path).get(DIGESTS)
    except FileNotFoundError:
        raise DamagedCheckpoint(path, checkpoint.name, "missing") from None
    except MetadataError as error:
        raise DamagedCheckpoint(path, checkpoint.name, str(error)) from error
    state.pop(DIGESTS, None)
    if digests is not None and json_digest([state, {part: digests[part] for part in PARTS}]) != digests[STATE]:
        raise DamagedCheckpoint(path, checkpoint.name, "its values are not those that were saved")
    if str(state.get("step", checkpoint.name)) != checkpoint.name:
        raise DamagedCheckpoint(path, checkpoint.name, f"it is the state of step {state['step']}")
    return state, digests


def read_arrays(checkpoint: Path, part: str, like: PyTree, expected: Mapping[str, ArrayDigest] | None) -> PyTree:
    """Reads the arrays of one part.

    Args:
      like: a tree with shapes, dtypes and shardings, on any mesh; None: all arrays, whole on the first device.
      expected: their digests; None: not known.

    Raises:
      DamagedCheckpoint: an array is missing, cannot be decoded, or is not what was saved.
      CheckpointError: a file cannot be read.
    """
    folder = checkpoint / part
    _check_readable(checkpoint, part)
    if like is None:
        like = _saved_template(folder) if expected is None else _lora_template(expected)
    _check_types(folder, like, expected)
    arrays = _restore(folder, like)
    found = {} if expected is None else tree_digests(arrays)
    if differences := changes(found, expected or {}):
        raise DamagedCheckpoint(
            folder, checkpoint.name, _listed("these arrays are not as they were saved:", differences)
        )
    return arrays


def _restore(folder: Path, like: PyTree) -> PyTree:
    # Without a template orbax would restore to the devices that saved, which this process may not have.
    return _with_orbax(folder, lambda checkpointer: checkpointer.restore(folder, like))


def _saved_template(folder: Path) -> PyTree:
    """Returns the tree of arrays that orbax says it has saved, on the first device."""
    metadata = _with_orbax(folder, lambda checkpointer: checkpointer.metadata(folder).item_metadata)
    device = _first_device()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), getattr(metadata, "tree", metadata)
    )


def _with_orbax[Result](folder: Path, read: "Callable[[ocp.StandardCheckpointer], Result]") -> Result:
    import orbax.checkpoint as ocp

    silence_threads()
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=named_processes()) as checkpointer:
            return read(checkpointer)
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # the device or the machine has too little memory
    except Exception as error:  # orbax raises Exception itself for a file that it cannot decode
        raise _failure(folder, error) from error


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _check_types(folder: Path, like: PyTree, expected: Mapping[str, ArrayDigest] | None) -> None:
    """Checks that the saved arrays have the dtypes and shapes that the caller needs.

    Raises:
      CheckpointError: they do not, as of another version of optax; the checkpoint may be sound.
    """
    if expected is None:
        return
    types = {path: (leaf.dtype.name, list(leaf.shape)) for path, leaf in by_path(like).items()}
    saved = {path: (digest["dtype"], digest["shape"]) for path, digest in expected.items()}
    differing = sorted(path for path in types.keys() | saved.keys() if types.get(path) != saved.get(path))
    if differing:
        lines = [f"{path}: found {saved.get(path)}, expected {types.get(path)}" for path in differing]
        problem = _listed("has other arrays than this run needs. Resume with the versions that saved it:", lines)
        raise CheckpointError(f"{folder}: {problem}")


def _lora_template(digests: Mapping[str, ArrayDigest]) -> PyTree:
    """Returns the tree of LoRA parameters that digests describe: by projection, then by leaf."""
    device = _first_device()
    tree: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, digest in digests.items():
        name, leaf = path.rsplit("/", 1)
        struct = jax.ShapeDtypeStruct(tuple(digest["shape"]), jnp.dtype(digest["dtype"]), sharding=device)
        tree.setdefault(name, {})[leaf] = struct
    return tree


def _check_readable(checkpoint: Path, part: str) -> None:
    """Checks that the files of a part exist and can be opened, before a library reads them.

    Raises:
      DamagedCheckpoint: the folder is missing, or holds something other than files and folders.
      CheckpointError: a file cannot be opened; it may be sound.
    """
    folder = checkpoint / part
    if not folder.is_dir():
        raise DamagedCheckpoint(folder, checkpoint.name, "missing")
    for path in sorted(folder.rglob("*")):
        if not path.exists():
            raise DamagedCheckpoint(path, checkpoint.name, "a link to a file that does not exist")
        if not (path.is_file() or path.is_dir()):  # a pipe would block its reader
            raise DamagedCheckpoint(path, checkpoint.name, "not a regular file")
        if not os.access(path, os.R_OK):
            raise CheckpointError(
                f"{path}: no permission to read a file of the checkpoint of step {checkpoint.name}. Make it readable"
            )


def _failure(folder: Path, error: BaseException) -> CheckpointError:
    """Returns the error for a folder that orbax cannot read: damaged, or unreadable at present."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    line = (str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__])[0]
    if any(isinstance(each, OSError) and not isinstance(each, FileNotFoundError) for each in chain) or any(
        text in line for text in NOT_DAMAGE
    ):
        return CheckpointError(f"{folder}: cannot be read: {_shortened(line)}. Remove the cause and try again")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    empty = [str(path.relative_to(folder)) for path in files if path.stat().st_size == 0]
    problem = f"{', '.join(empty)}: empty" if empty else _shortened(line)
    return DamagedCheckpoint(folder, folder.parent.name, problem)


def _shortened(line: str) -> str:
    """Returns tensorstore's message without its status, its drivers and their settings."""
    return re.sub(r'^[A-Z_]+: |Error opening "\w+" driver: ', "", line.partition(" [tensorstore_spec=")[0])


def _listed(start: str, lines: list[str]) -> str:
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n    ".join([start, *lines[:SHOWN], *rest])
