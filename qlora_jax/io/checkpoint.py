"""Reads and writes a run's folder and its checkpoints, which orbax can read without this package.

    RUN/config.yaml                       the resolved configuration
    RUN/initial.safetensors               the initial adapter, if it contains a part of the weights (lora.init)
    RUN/metrics.jsonl                     one line per step or evaluation
    RUN/report.html, report.json          the report of the run, for people and for programs
    RUN/checkpoints/STEP/lora             {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}
    RUN/checkpoints/STEP/optimizer        the optax state
    RUN/checkpoints/STEP/state            JSON: step, data position, configuration, fingerprint of the base, versions

A checkpoint gets its name when all of it is on disk, so an interrupted write never leaves a partial checkpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import PreservationContext, PreservationPolicy

from qlora_jax.config import LoraArgs, ModelArgs, read_config
from qlora_jax.io.adapter_init import InitialAdapter, read_initial
from qlora_jax.io.model_source import JsonObject

CONFIG_FILE, CHECKPOINT_FOLDER = "config.yaml", "checkpoints"


def saved_steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints of a run, ascending; empty if the run has none."""
    folder = run / CHECKPOINT_FOLDER
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


class CheckpointError(OSError):
    """Raised if a checkpoint cannot be written or read; the message says why, and which checkpoint is still usable."""


@dataclasses.dataclass
class _RetentionPolicy(PreservationPolicy):
    """Retains the newest `count` checkpoints and the one of `retained_step`."""

    count: int
    retained_step: int | None = None

    # orbax's protocol PolicyCheckpointInfo cannot be checked at run time, hence Any.
    def should_preserve(self, checkpoints: Sequence[Any], *, context: PreservationContext) -> Sequence[bool]:
        newest = len(checkpoints) - self.count
        return [index >= newest or info.step == self.retained_step for index, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the one of `retain`; a context manager.

    Saving is synchronous: when `save` returns, the checkpoint is on disk.
    """

    def __init__(self, run: Path, keep: int):
        self._policy = _RetentionPolicy(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy, enable_async_checkpointing=False)
        self.folder = (run / CHECKPOINT_FOLDER).absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def retain(self, step: int) -> None:
        """Retains the checkpoint of one step for as long as no other step is retained, however many follow."""
        self._policy.retained_step = step

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
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            lora=ocp.args.StandardSave(lora),
            optimizer=ocp.args.StandardSave(optimizer_state),
            state=ocp.args.JsonSave(dict(state)),
        )
        try:
            self._manager.save(step, args=items)
        except (OSError, ValueError) as error:  # tensorstore raises ValueError if the disk is full
            last = self._manager.latest_step()
            good = "no earlier checkpoint exists"
            if last is not None:
                good = f"the checkpoint of step {last} is complete and loads"
            raise CheckpointError(
                f"{self.folder}: step {step} cannot be saved: {_first_line(error)}; {good}. Free disk space or make "
                "the folder writable, then run again with --resume"
            ) from error

    def restore(self, lora_like: PyTree, optimizer_like: PyTree) -> tuple[PyTree, PyTree, JsonObject]:
        """Reads the newest checkpoint.

        Args:
          lora_like: a tree with the shapes, dtypes and devices of the LoRA parameters.
          optimizer_like: the same for the optimizer state.

        Returns:
          (LoRA parameters, optimizer state, the JSON part).

        Raises:
          CheckpointError: the checkpoint cannot be read.
        """
        step = self.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (lora_like, optimizer_like))
        items = ocp.args.Composite(
            lora=ocp.args.StandardRestore(abstract[0]),
            optimizer=ocp.args.StandardRestore(abstract[1]),
            state=ocp.args.JsonRestore(),
        )
        saved = _restore(self._manager, self.folder, step, items)
        return saved["lora"], saved["optimizer"], saved["state"]

    def read_state(self) -> JsonObject:
        """Reads only the JSON part of the newest checkpoint."""
        items = ocp.args.Composite(state=ocp.args.JsonRestore())
        return _restore(self._manager, self.folder, self.latest_step(), items)["state"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run at one of its checkpoints, or a PEFT adapter that another library trained.

    Attributes:
      path: the run's or adapter's folder.
      model: settings of the base model.
      lora_args: settings of the adapter.
      chat_template: the jinja file of the run's data settings, or None.
      step: the checkpoint's step; None for a PEFT adapter.
      lora: LoRA parameters by our names.
      fingerprint: identifies the base; None for a PEFT adapter.
      new_ids: ids of the tokens whose rows were trained; filled in when the tokenizer is known.
      initial: the initial adapter, if it contains a part of the weights.
      tables: embedding and head that replace the base's, from a PEFT adapter.
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

    @property
    def label(self) -> str:
        """The run's name and step, for messages."""
        return self.path.name if self.step is None else f"{self.path.name}, step {self.step}"


def open_run(path: Path, step: int | None = None) -> Run:
    """Reads the run in a folder, at its newest checkpoint or at `step`.

    Raises:
      ValueError: the folder is not a run, or lacks the checkpoint (those that exist are named).
      CheckpointError: the checkpoint cannot be read.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(
            f"{path}: not a run folder ({CONFIG_FILE} is missing). Give the folder that training wrote (output)"
        )
    folder, steps = (path / CHECKPOINT_FOLDER).absolute(), saved_steps(path)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"a checkpoint of step {step}"
        raise ValueError(f"{path}: does not have {wanted} (found steps: {steps or 'none'}). Give one of these steps")
    step = steps[-1] if step is None else step
    items = ocp.args.Composite(lora=ocp.args.StandardRestore(), state=ocp.args.JsonRestore())
    with ocp.CheckpointManager(folder) as manager:
        saved = _restore(manager, folder, step, items)
    config = read_config(path / CONFIG_FILE)
    return Run(
        path=path,
        model=config.model,
        lora_args=config.lora,
        chat_template=config.data.chat_template,
        step=step,
        lora=saved["lora"],
        fingerprint=saved["state"]["fingerprint"],
        initial=read_initial(path, config.lora),
    )


def _restore(
    manager: ocp.CheckpointManager, folder: Path, step: int | None, items: ocp.args.Composite
) -> ocp.args.Composite:
    try:
        return cast(ocp.args.Composite, manager.restore(step, args=items))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: the checkpoint of step {step} cannot be read: {_first_line(error)}. Remove that folder to use "
            "an earlier step"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
