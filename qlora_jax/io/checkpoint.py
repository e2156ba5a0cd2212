"""A run's folder on disk, and its checkpoints: orbax, plain dicts, nothing of this package needed to read them.

    RUN/config.yaml                       the resolved configuration
    RUN/initial.safetensors               what adapters begin with, where that is a part of the weights (lora.init)
    RUN/metrics.jsonl                     one line a step or evaluation
    RUN/report.html, report.json          what is known of the run, for people and for programs
    RUN/checkpoints/STEP/lora             {"model.layers.self_attn.q_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}
    RUN/checkpoints/STEP/optimizer        the optax state
    RUN/checkpoints/STEP/state            JSON: step, data position, configuration, fingerprint of the base, versions

A checkpoint appears under its name when all of it is on disk: one cut off while it was written is never seen.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from qlora_jax.config import LoraArgs, ModelArgs, read_config
from qlora_jax.io.adapter_init import Initial, read_initial

CONFIG_FILE, CHECKPOINT_FOLDER = "config.yaml", "checkpoints"


def saved_steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder, ascending; none where there is no such folder."""
    folder = run / CHECKPOINT_FOLDER
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says which, why, and what is still good."""


@dataclasses.dataclass
class _Kept(PreservationPolicy):
    """The newest `count` checkpoints, and that of step `also`."""

    count: int
    also: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest = len(checkpoints) - self.count
        return [index >= newest or info.step == self.also for index, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them and one more that is named; a context manager.

    Saving is synchronous: when `save` returns the checkpoint is on disk.
    """

    def __init__(self, run: Path, keep: int):
        self._kept = _Kept(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept, enable_async_checkpointing=False)
        self.folder = (run / CHECKPOINT_FOLDER).absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def keep_also(self, step: int) -> None:
        """From now on, the checkpoint of this step stays, however many follow; the one named before does not."""
        self._kept.also = step

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, lora: Any, optimizer_state: Any, state: Mapping[str, Any]) -> None:
        """Writes one checkpoint, then removes those beyond `keep`; does nothing where `step` is saved already.

        Raises:
          CheckpointError: it could not be written; earlier checkpoints are untouched.
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
        except (OSError, ValueError) as error:  # tensorstore tells of a full disk by ValueError
            last = self._manager.latest_step()
            good = (
                "no earlier checkpoint exists" if last is None else f"the checkpoint of step {last} is whole and loads"
            )
            raise CheckpointError(
                f"step {step} could not be saved in {self.folder}: {_first_line(error)}; {good}. Make room or make the "
                "folder writable, then run again with --resume"
            ) from error

    def restore(self, lora_like: Any, optimizer_like: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(LoRA, optimizer state, state) of the newest checkpoint, in the shapes and on the devices of the likes."""
        step = self.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (lora_like, optimizer_like))
        items = ocp.args.Composite(
            lora=ocp.args.StandardRestore(abstract[0]),
            optimizer=ocp.args.StandardRestore(abstract[1]),
            state=ocp.args.JsonRestore(),
        )
        saved = _restore(self._manager, self.folder, step, items)
        return saved["lora"], saved["optimizer"], saved["state"]

    def read_state(self) -> dict[str, Any]:
        """The JSON part of the newest checkpoint alone."""
        items = ocp.args.Composite(state=ocp.args.JsonRestore())
        return _restore(self._manager, self.folder, self.latest_step(), items)["state"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished or stopped run, as its checkpoint tells it; or an adapter that was made elsewhere.

    Fields:
      step, fingerprint: None where they are not known.
      new_ids: of the tokens whose rows were trained; known with the tokenizer.
      initial: what the adapters began with, where that is a part of the weights.
      tables: embedding and head in place of the base's, of an adapter that was made elsewhere.
    """

    path: Path
    model: ModelArgs
    lora_args: LoraArgs
    chat_template: str | None
    step: int | None
    lora: Mapping[str, Mapping[str, jax.Array | np.ndarray]]
    fingerprint: str | None
    new_ids: tuple[int, ...] = ()
    initial: Initial | None = None
    tables: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """What people are told that it is."""
        return self.path.name if self.step is None else f"{self.path.name}, step {self.step}"


def open_run(path: Path, step: int | None = None) -> Run:
    """The run in a folder, at its newest checkpoint or at `step`.

    Raises:
      ValueError: no run there, or no such checkpoint: those that exist are named.
      CheckpointError: the checkpoint cannot be read.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(
            f"{path} holds no run: {CONFIG_FILE} is not there; give the folder that training wrote (output)"
        )
    folder, steps = (path / CHECKPOINT_FOLDER).absolute(), saved_steps(path)
    if not steps or (step is not None and step not in steps):
        wanted = "any checkpoint" if step is None else f"a checkpoint of step {step}"
        raise ValueError(f"{path} does not hold {wanted}: steps saved are {steps or 'none'}")
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


def _restore(manager: ocp.CheckpointManager, folder: Path, step: int | None, items: Any) -> Any:
    try:
        return manager.restore(step, args=items)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint of step {step} in {folder} cannot be read: {_first_line(error)}; remove that folder to "
            "fall back to an earlier step"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
