"""Resumes a run: its state, the JSON part of a checkpoint, and the check that a checkpoint fits the run."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence

import jax
import jaxlib
import optax
import orbax.checkpoint

from qlora_jax.config import Config, HostsArgs, MeshArgs, QuestionArgs, differences, plain_name, to_dict
from qlora_jax.config.parse import ConfigError, from_dict
from qlora_jax.io.digests import json_digest
from qlora_jax.io.loading.base_fingerprint import EARLIER_OFFSETS
from qlora_jax.io.run_folder.checkpoint import FIRST_ROUNDED, TEMPLATE_KEY, Checkpoints
from qlora_jax.io.run_folder.start_parameters import FILE as START_FILE
from qlora_jax.io.run_folder.start_parameters import STATE_KEY
from qlora_jax.line_digests import LinesDigest
from qlora_jax.models.partition import Lora
from qlora_jax.rewards.digests import check_same_code, code_digests
from qlora_jax.training.device_mesh import mesh_size
from qlora_jax.training.early_stopping import BestEvaluation
from qlora_jax.training.loss_scale import LOSS_SCALE, LossScale
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.optimizer_state import OptimizerState
from qlora_jax.training.session import Session

# Settings that may differ on resume: they do not change what is computed, or they name content that is checked by its
# fingerprint (base model and data).
MAY_DIFFER = {
    "model.path",
    "data.train",
    "data.eval",
    "data.cache",
    "data.template_date",
    "output",
    "train.eval_every",
    "train.save_every",
    "train.keep",
    "train.keep_best",
    "train.samples",
    "train.sample_tokens",
    "train.patience",
    "train.log_every",
    "train.track",
    "train.trace_steps",
    "optim.paging",
    "optim.paging_budget",
    "rollouts.cache",
    "rewards.workers",
    "rewards.timeout",
    "rewards.memory",
    *(
        f"{section}.{field.name}"
        for section, settings in {"questions": QuestionArgs, "mesh": MeshArgs, "hosts": HostsArgs}.items()
        for field in dataclasses.fields(settings)
    ),
}

# They may differ as well, if their product, the rows of an optimizer step, is the same, and no loss is a mean over a
# micro-batch (bnpo).
SPLIT = {"train.micro_batch_size", "train.accumulation"}

MESH_KEY = "mesh"
RECORDS, CODE = "records", "code"
EVALUATION_DUE = "evaluation_due"  # a key of a checkpoint's state, there only if it is true

# Keys of the state that a resumed run requires.
RESUME_KEYS = ("step", "position", "best", "fingerprint", "data_fingerprint", "config")


@dataclasses.dataclass
class TrainState:
    """The state of a run after `step` steps.

    Attributes:
      optimizer_state: as `session.state_manager` represents it.
      position: the data position of the next batch.
      best: the best evaluation so far.
      loss_scale: the factor of the loss in float16; None in other dtypes.
      evaluation_due: the evaluation after `step` was cut off by a signal; a resumed run begins with it.
      records: digests of the lines of metrics.jsonl and samples.jsonl, if the run resumes from a checkpoint with them.
    """

    lora: Lora
    optimizer_state: OptimizerState
    step: int
    position: dict[str, int]
    best: BestEvaluation
    loss_scale: LossScale | None = None
    evaluation_due: bool = False
    records: Mapping[str, LinesDigest] = dataclasses.field(default_factory=dict)


def checkpoint_state(session: Session, step: int, position: dict[str, int], best: BestEvaluation) -> dict[str, object]:
    """Returns the JSON part of a checkpoint after `step` steps, with the next data position and the mesh of the run."""
    template = session.run.inputs.dataset.tokenizer.chat_template
    return {
        "step": step,
        "position": position,
        "window_order": session.run.inputs.dataset.window_order(position["epoch"]),
        "best": dataclasses.asdict(best),
        "fingerprint": session.fingerprint,
        "data_fingerprint": session.run.inputs.dataset.fingerprint,
        "config": to_dict(session.run.config),
        **({} if session.initial_digest is None else {STATE_KEY: session.initial_digest}),
        **({} if session.run.inputs.rollouts is None else {CODE: session.run.inputs.rollouts.code}),
        **({} if session.run.config.data.chat_template is None else {TEMPLATE_KEY: json_digest(template)}),
        **({} if session.run.config.lora.merge_from == 0 else {FIRST_ROUNDED: session.run.first_rounded}),
        MESH_KEY: mesh_size(session.run.mesh)._asdict(),
        "versions": {m.__name__: m.__version__ for m in (jax, jaxlib, optax, orbax.checkpoint)},
    }


def _required_keys(session: Session) -> tuple[str, ...]:
    # An early version read windows in the file's order and did not store the order.
    return RESUME_KEYS if session.run.inputs.dataset.train.windows == 1 else (*RESUME_KEYS, "window_order")


def _unpaged(config: Config) -> Config:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=plain_name(config.optim.name)))


def _saved_config(session: Session, state: Record) -> Config:
    try:
        return from_dict(Config, state["config"], {})
    except ConfigError as error:
        raise ValueError(
            f"{session.run.config.output}: the settings in the checkpoint of step {state['step']} are not those of "
            f"this version of qlora_jax:\n  " + "\n  ".join(error.problems)
        ) from error


def settings_to_resume(config: Config, state: Record, *, accept_changed_reward: bool = False) -> Config:
    """Returns the settings with what the saved run found at its start, if they lack it.

    That is the date, if its template writes it, and the types of a mixture (`lora.merge_types`).

    Called before anything is loaded.

    Args:
      state: of a checkpoint; without settings that this version can read, the result is `config`.
      accept_changed_reward: files of reward functions may have changed.

    Raises:
      ValueError: settings differ from those of the checkpoint, with each difference.
    """
    try:
        saved = from_dict(Config, state.get("config", {}), {})
    except ConfigError:
        return config
    if config.lora.merge_into is not None and not config.lora.merge_types:
        lora = dataclasses.replace(config.lora, merge_types=saved.lora.merge_types)
        config = dataclasses.replace(config, lora=lora)
    _refuse(config, state, _changed_settings(config, saved))
    check_same_code(state.get(CODE, {}), code_digests(config), accept_changed=accept_changed_reward)
    if config.data.template_date is not None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=saved.data.template_date))


def _rows_per_step(config: Config) -> int:
    return config.train.micro_batch_size * config.train.accumulation


def _is_same_data(session: Session, state: Record, saved: Config) -> bool:
    dataset, train = session.run.inputs.dataset, saved.train
    earlier = dataset.fingerprint_of_split(train.accumulation, train.micro_batch_size)
    return state["data_fingerprint"] in (dataset.fingerprint, earlier)


def warn_of_other_masks(config: Config, state: Record) -> None:
    """Warns if the checkpoint is of a version that drew dropout masks per micro-batch, and whose state has no mesh."""
    if config.lora.dropout and MESH_KEY not in state:
        warnings.warn(
            f"{config.output}: lora.dropout: an earlier version of qlora_jax, with other dropout masks, saved the "
            f"checkpoint of step {state['step']}. The losses will differ from those of an uninterrupted run.",
            stacklevel=2,
        )


def check_resumable(session: Session, state: Record) -> None:
    """Checks that a resumed run gives the same results as an uninterrupted one; warns of other dropout masks.

    Raises:
      ValueError: the checkpoint lacks a required key; or settings, base model or data differ, with each difference.
    """
    if missing := [name for name in _required_keys(session) if name not in state]:
        raise ValueError(
            f"{session.run.config.output}: the checkpoint of step {state.get('step')} lacks {', '.join(missing)}, "
            "because another version of qlora_jax wrote it. Resume with that version, or start a new run in another "
            "output folder; lora.start continues from the exported adapter."
        )
    saved = _saved_config(session, state)
    problems = _changed_settings(session.run.config, saved)
    if session.fingerprint != state["fingerprint"]:
        problems.append(
            f"the base model: fingerprint {state['fingerprint'][:12]} in the checkpoint "
            f"({state['config']['model']['path']}), {session.fingerprint[:12]} now ({session.run.config.model.path}). "
            f"{EARLIER_OFFSETS}"
        )
    if not _is_same_data(session, state, saved):
        problems.append(f"data.train: other rows or tokens than in the checkpoint ({session.run.config.data.train})")
    elif "window_order" in state and state["window_order"] != (
        now := session.run.inputs.dataset.window_order(epoch := state["position"]["epoch"])
    ):
        problems.append(f"windows of epoch {epoch}: order {state['window_order']} in the checkpoint, {now} now")
    if state.get(STATE_KEY) != session.initial_digest:
        problems.append(
            "the parameters that the run started with, whose model is the reference: other values than at its start. "
            f"They come from {START_FILE} in the run's folder if it has one, otherwise from lora.start "
            f"({session.run.config.lora.start}) or the seed"
        )
    _refuse(session.run.config, state, problems)
    warn_of_other_masks(session.run.config, state)


def _changed_settings(config: Config, saved: Config) -> list[str]:
    may_split = _rows_per_step(saved) == _rows_per_step(config) and config.policy.loss_type != "bnpo"
    may_differ = MAY_DIFFER | (SPLIT if may_split else set())
    return [
        f"{key}: {then!r} in the checkpoint, {now!r} now"
        for key, (then, now) in differences(_unpaged(saved), _unpaged(config)).items()
        if key not in may_differ
    ]


def _refuse(config: Config, state: Record, problems: Sequence[str]) -> None:
    """Raises ValueError if there are problems."""
    if problems:
        raise ValueError(
            f"{config.output}: cannot resume from the checkpoint of step {state['step']}, because these differ:\n  "
            + "\n  ".join(problems)
            + "\nUse the same settings; or start a new run from the exported adapter (export, lora.start)."
        )


def restore(session: Session, checkpoints: Checkpoints) -> TrainState:
    """Restores the newest sound checkpoint, after a check against the session's settings, base model and data.

    Raises:
      ValueError: the run cannot resume from it; see `check_resumable`.
      CheckpointError: more than the newest checkpoint is damaged.
    """
    template = session.state_manager.checkpoint_template(session.parts.lora)
    check = functools.partial(check_resumable, session)
    lora, optimizer_state, saved = checkpoints.restore(session.parts.lora, template, check)
    best = BestEvaluation.from_checkpoint(saved)
    if session.run.config.train.keep_best:
        checkpoints.retain(best.step)
    return TrainState(
        lora,
        session.state_manager.from_checkpoint(optimizer_state),
        saved["step"],
        saved["position"],
        best,
        LossScale(**saved[LOSS_SCALE]) if session.run.gradients.is_scaled else None,
        evaluation_due=saved.get(EVALUATION_DUE, False),
        records=saved.get(RECORDS, {}),
    )
