"""Reads and writes a run's folder and its checkpoints, which orbax can read without this package.

    RUN/config.yaml                       the resolved configuration
    RUN/initial.safetensors               the initial adapter, if it contains a part of the weights (lora.init)
    RUN/start.safetensors                 the parameters that a run of a model in memory started with
    RUN/head.json                         the meaning of a sequence head's outputs, if the objective trains one
    RUN/metrics.jsonl                     one line per step or evaluation
    RUN/samples.jsonl                     one line per sample reply
    RUN/report.html, report.json          the report of the run, for people and for programs
    RUN/checkpoints/STEP/lora             {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}
    RUN/checkpoints/STEP/optimizer        the optax state
    RUN/checkpoints/STEP/state            JSON: step, data position, configuration, fingerprint of the base, versions,
                                          digests of the state, of every array and of the lines of records
    RUN/checkpoints/STEP.damaged          a damaged checkpoint that a resumed run passed over

A checkpoint gets its name when all of it is written, so an interrupted write never leaves a partial checkpoint.
"""

import dataclasses
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from qlora_jax.atomic_files import make_folder, sync_tree
from qlora_jax.config import Config, LoraArgs, ModelArgs, differences, read_config
from qlora_jax.config.fields import TemplateValue
from qlora_jax.config.parse import from_dict
from qlora_jax.io.head_file import read_run_head
from qlora_jax.io.initial_file import InitialAdapter, read_initial
from qlora_jax.io.run_folder.checkpoint_reader import (
    LORA,
    OPTIMIZER,
    STATE,
    CheckpointError,
    DamagedCheckpoint,
    barrier,
    named_processes,
    read_arrays,
    read_state,
    silence_threads,
    with_digests,
)
from qlora_jax.io.run_folder.run_lock import CONFIG_FILE, RunLock
from qlora_jax.io.run_folder.start_parameters import STATE_KEY, read_start
from qlora_jax.line_digests import warn_without_digests
from qlora_jax.methods.peft_form import NO_ARRAYS
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import JsonObject

CHECKPOINT_FOLDER = "checkpoints"
REMOVED = "removed"  # in the folder of checkpoints; an old one moves there at once, and is deleted file by file
TEMPLATE_KEY = "chat_template"  # key of the digest of the text of data.chat_template, in a checkpoint's JSON
FIRST_ROUNDED = "first_rounded"  # key of the number of steps before `lora.merge_from`, in a checkpoint's JSON
SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")  # in errors of tensorstore


def saved_steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints of a run, ascending; empty if the run has none."""
    folder = run / CHECKPOINT_FOLDER
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def newest_state(run: Path) -> JsonObject:
    """The JSON part of a run's newest checkpoint; empty if there is none that can be read."""
    try:
        state, _ = read_state((run / CHECKPOINT_FOLDER / str(max(saved_steps(run), default=0))).absolute())
    except CheckpointError:
        return {}
    return state


def saved_fingerprint(run: Path) -> str | None:
    """The fingerprint of the base in a run's newest checkpoint; None if there is none that can be read."""
    return newest_state(run).get("fingerprint")


class Restored(NamedTuple):
    """A checkpoint's LoRA parameters, optimizer state, and JSON part."""

    lora: PyTree
    optimizer_state: PyTree
    state: JsonObject


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the one of `retain`; a context manager.

    Saving is synchronous: when `save` returns, the checkpoint is flushed to the disk. Only then are older ones removed,
    so that a disk that fails still holds a whole checkpoint.
    """

    def __init__(self, run: Path, keep: int):
        import orbax.checkpoint as ocp

        silence_threads()
        self._keep = keep
        self._retained_step: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,  # orbax would remove old ones before the new one is flushed
            enable_async_checkpointing=False,
            lightweight_initialize=True,  # times and metrics are not used
            multiprocessing_options=named_processes(),
            create=False,  # orbax does not create it for several processes
            todelete_subdir=REMOVED,
        )
        self.folder = (run / CHECKPOINT_FOLDER).absolute()
        make_folder(self.folder)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def retain(self, step: int) -> None:
        """Retains the checkpoint of one step for as long as no other step is retained, however many follow."""
        self._retained_step = step

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, lora: PyTree, optimizer_state: PyTree, state: Mapping[str, object]) -> None:
        """Writes one checkpoint, then removes those beyond `keep`; does nothing if `step` is already saved.

        Args:
          lora: LoRA parameters.
          optimizer_state: the optax state.
          state: values for the JSON part.

        Raises:
          CheckpointError: it cannot be written; earlier checkpoints are untouched.
        """
        import orbax.checkpoint as ocp

        if step in self._manager.all_steps():
            return
        last = self.latest_step()
        parts = {
            LORA: ocp.args.StandardSave(lora),
            OPTIMIZER: ocp.args.StandardSave(optimizer_state),
            STATE: ocp.args.JsonSave(with_digests(state, lora, optimizer_state)),
        }
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(**parts))
        except (OSError, ValueError) as error:  # tensorstore raises ValueError if the disk is full
            nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((lora, optimizer_state)))
            problem = f"{_system_problem(error)} ({nbytes:,} bytes were to be written)"
            raise CheckpointError(self._not_saved(step, problem, last)) from error
        if not saved:
            raise CheckpointError(self._not_saved(step, "orbax skipped it", last))
        try:
            sync_tree(self.folder / str(step))
        except OSError as error:
            raise CheckpointError(self._not_saved(step, str(error), last)) from error
        self._remove_old(step)

    def _remove_old(self, step: int) -> None:
        """Removes checkpoints beyond the newest `keep`, after all processes have flushed that of `step`."""
        old = [one for one in sorted(self._manager.all_steps())[: -self._keep] if one != self._retained_step]
        if not old:
            return
        barrier(f"checkpoint {step} is flushed")
        for one in old:
            self._manager.delete(one)
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / REMOVED, ignore_errors=True)

    def _not_saved(self, step: int, problem: str, last: int | None) -> str:
        start = f"{self.folder}: step {step} cannot be saved: {problem}; "
        fix = "Free disk space or make the folder writable, then run again"
        if last is None:
            return f"{start}no earlier checkpoint exists. {fix} in a new output folder"
        return f"{start}the checkpoint of step {last} is complete. {fix} with --resume"

    def restore(
        self, lora_like: PyTree, optimizer_like: PyTree, check: Callable[[JsonObject], None] = lambda state: None
    ) -> Restored:
        """Reads the newest checkpoint; if it is damaged but the one before it is not, reads that one, with a warning.

        A damaged checkpoint that was passed over is renamed to STEP.damaged, so that its step can be saved again.

        Args:
          lora_like: a tree with the shapes, dtypes and shardings of the LoRA parameters. Their mesh need not be the one
            that saved them.
          optimizer_like: the same for the optimizer state.
          check: called with the JSON part before arrays are read; raises if the run cannot resume from it.

        Raises:
          CheckpointError: no checkpoint can be read; or more than the newest is damaged, and the message names the
            newest sound one.
        """
        damage: list[DamagedCheckpoint] = []
        for step in reversed(saved_steps(self.folder.parent)):
            try:
                restored = self._read(step, lora_like, optimizer_like, check)
            except DamagedCheckpoint as error:
                damage.append(error)
                continue
            if len(damage) > 1:
                raise CheckpointError(_several_damaged(self.folder, damage, step))
            if damage:
                self._pass_over(damage[0], step)
            return restored
        raise CheckpointError(_several_damaged(self.folder, damage, None))

    def _read(
        self, step: int, lora_like: PyTree, optimizer_like: PyTree, check: Callable[[JsonObject], None]
    ) -> Restored:
        import orbax.checkpoint as ocp

        folder = self.folder / str(step)
        state, digests = read_state(folder)
        check(state)
        trees = {LORA: lora_like, OPTIMIZER: optimizer_like}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trees)
        parts = {part: read_arrays(folder, part, abstract[part], digests and digests[part]) for part in trees}
        if digests is None:
            warn_without_digests(self.folder.parent)
        return Restored(parts[LORA], parts[OPTIMIZER], state)

    def _pass_over(self, damage: DamagedCheckpoint, sound: int) -> None:
        """Renames a damaged checkpoint, so that orbax no longer counts it, and warns."""
        names = itertools.chain([f"{damage.step}.damaged"], (f"{damage.step}.damaged-{i}" for i in itertools.count(2)))
        name = next(name for name in names if not (self.folder / name).exists())
        barrier("damaged checkpoint found")
        if jax.process_index() == 0:
            (self.folder / damage.step).rename(self.folder / name)
        barrier("damaged checkpoint renamed")
        self._manager.reload()
        warnings.warn(
            f"{damage}\nIt was renamed to {name}. The run continues from step {sound}, the newest sound checkpoint",
            stacklevel=3,
        )


def _several_damaged(folder: Path, damage: Sequence[DamagedCheckpoint], sound: int | None) -> str:
    problems = "\n  ".join(["", *map(str, damage)])
    if sound is None:
        return (
            f"{folder}: does not have a checkpoint that can be read{problems}\nCopy one from a backup, or start a new "
            "run in another output folder"
        )
    return (
        f"{folder}: the newest {len(damage)} checkpoints are damaged{problems}\nThe newest sound one is of step "
        f"{sound}. To resume from it, remove or rename the folders of the damaged ones"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run at one of its checkpoints, or a PEFT adapter that another library trained.

    Attributes:
      path: the run's or adapter's folder.
      model: settings of the base model.
      lora_args: settings of the adapter.
      chat_template: the jinja file of the run's data settings, or None.
      chat_template_kwargs: variables of these settings for the template.
      step: the checkpoint's step; None for a PEFT adapter.
      lora: LoRA parameters by our names.
      fingerprint: identifies the base; None for a PEFT adapter.
      new_ids: ids of the tokens whose rows were trained; filled in when the tokenizer is known.
      initial: the initial adapter, if it contains a part of the weights.
      tables: embedding and head that replace the base's, from a PEFT adapter.
      frozen: arrays from a PEFT adapter that its method would draw from the settings, if the adapter has others.
      head: the sequence head that was trained, if any; its matrix is in `lora`.
      start: the parameters that the run started with, if it stored them.
      start_digest: their digest, if its objective had a reference (start_parameters.py).
      template_digest: of the text of `chat_template` in training; None in runs of earlier versions.
      rounded: False: all of its steps came before those with rounded weights (`lora.merge_from`).
    """

    path: Path
    model: ModelArgs
    lora_args: LoraArgs
    chat_template: str | None
    step: int | None
    lora: Mapping[str, Mapping[str, jax.Array | np.ndarray]]
    fingerprint: str | None
    new_ids: tuple[int, ...] = ()
    initial: InitialAdapter | None = None
    tables: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    frozen: Mapping[str, np.ndarray] = NO_ARRAYS
    chat_template_kwargs: Mapping[str, TemplateValue] = dataclasses.field(default_factory=dict)
    head: TrainedHead | None = None
    start: Mapping[str, Mapping[str, jax.Array | np.ndarray]] | None = None
    start_digest: str | None = None
    template_digest: str | None = None
    rounded: bool = True

    @property
    def label(self) -> str:
        """The run's name and step, for messages."""
        return self.path.name if self.step is None else f"{self.path.name}, step {self.step}"


def open_run(path: Path, step: int | None = None) -> Run:
    """Reads the run in a folder, at its newest checkpoint or at `step`.

    A training run may remove a checkpoint that is being read; then the newest is the next one.

    Raises:
      ValueError: the folder is not a run, or lacks the checkpoint (those that exist are named).
      CheckpointError: the checkpoint cannot be read.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(
            f"{path}: not a run folder ({CONFIG_FILE} is missing). Give the folder that training wrote (output)"
        )
    steps = saved_steps(path)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"a checkpoint of step {step}"
        raise ValueError(f"{path}: does not have {wanted} (found steps: {steps or 'none'}). Give one of these steps")
    found = steps[-1] if step is None else step
    try:
        lora, state = _read_lora(path, found)
    except CheckpointError as error:
        if found in (left := saved_steps(path)):
            advice = f"\n{_advice(path, found)}" if isinstance(error, DamagedCheckpoint) else ""
            raise CheckpointError(f"{error}{advice}") from error
        if step is None:
            return open_run(path)
        raise ValueError(
            f"{path}: the checkpoint of step {step} was removed while it was read; a training run keeps the newest "
            f"train.keep (found steps: {left or 'none'}). Give one of these steps, or none for the newest"
        ) from error
    config = read_config(path / CONFIG_FILE)
    _check_config(path, config, state)
    return Run(
        path=path,
        model=config.model,
        lora_args=config.lora,
        chat_template=config.data.chat_template,
        chat_template_kwargs=config.data.chat_template_kwargs,
        step=found,
        lora=lora,
        fingerprint=state["fingerprint"],
        initial=read_initial(path, config.lora),
        head=read_run_head(path, config.objective),
        start=read_start(path),
        start_digest=state.get(STATE_KEY),
        template_digest=state.get(TEMPLATE_KEY),
        rounded=found > state.get(FIRST_ROUNDED, -1),
    )


def _read_lora(run: Path, step: int) -> tuple[PyTree, JsonObject]:
    folder = (run / CHECKPOINT_FOLDER / str(step)).absolute()
    state, digests = read_state(folder)
    if "fingerprint" not in state:
        raise DamagedCheckpoint(folder / STATE, str(step), "the fingerprint of the base is missing")
    lora = read_arrays(folder, LORA, None, digests and digests[LORA])
    if digests is None:
        warn_without_digests(run)
    return lora, state


def _advice(run: Path, damaged: int) -> str:
    """Returns advice for a damaged checkpoint: the newest other step whose LoRA parameters are sound."""
    for step in reversed(saved_steps(run)):
        if step == damaged:
            continue
        try:
            _read_lora(run, step)
        except CheckpointError:
            continue
        return f"Give step {step} to use the newest sound checkpoint"
    return "No other checkpoint of the run is sound. Copy one from a backup, or train again"


def _check_config(run: Path, config: Config, state: JsonObject) -> None:
    """Checks that config.yaml describes the base and the adapter of a checkpoint.

    Raises:
      ValueError: it does not; each setting that differs is listed.
    """
    if "config" not in state:
        return
    saved = from_dict(Config, state["config"])
    lines = [
        f"  {key}: found {now!r}, expected {then!r}"
        for key, (then, now) in differences(saved, config).items()
        if key.startswith(("model.", "lora.")) and key != "model.path"
    ]
    if lines:
        start = f"{run / CONFIG_FILE}: does not describe the run, whose checkpoint has other settings. Correct these:"
        raise ValueError("\n".join([start, *lines]))


def _system_problem(error: OSError | ValueError) -> str:
    """The operating system's text for an error of orbax; the first line of other errors."""
    code = SYSTEM_ERROR.search(str(error))
    number = int(code[1]) if code else error.errno if isinstance(error, OSError) else None
    return _first_line(error) if number is None else os.strerror(number)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


class LockedCheckpoints(Checkpoints):
    """The checkpoints of a run that has locked its folder; each save checks that the folder is still the same.

    Without the check, orbax makes a deleted or moved folder anew, and the run continues in an empty one.
    """

    def __init__(self, lock: RunLock, keep: int):
        lock.check()
        super().__init__(lock.folder, keep)
        self._lock = lock

    def save(self, step: int, lora: PyTree, optimizer_state: PyTree, state: Mapping[str, object]) -> None:
        """Writes one checkpoint; see `Checkpoints.save`.

        Raises:
          FolderLostError: the folder went away before or while the checkpoint was written.
          CheckpointError: it cannot be written.
        """
        self._lock.check()
        try:
            super().save(step, lora, optimizer_state, state)
        finally:
            self._lock.check()
