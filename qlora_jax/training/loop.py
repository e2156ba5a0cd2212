"""The training loop: takes batches, reports metrics, saves checkpoints, and can stop after any step."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.data.batching.batches import START
from qlora_jax.data.batching.packing import Batch
from qlora_jax.inference.lowering import ProgramMemory
from qlora_jax.io.run_folder.checkpoint import Checkpoints, saved_steps
from qlora_jax.line_digests import LinesDigest
from qlora_jax.methods.merge_into import without_rounding
from qlora_jax.objectives.router_losses import step_arrays, unrouted
from qlora_jax.optim.page_pool import Transfers
from qlora_jax.rewards.functions import RewardError
from qlora_jax.training.device_mesh import local_devices, mesh_size, place_batch
from qlora_jax.training.early_stopping import BestEvaluation
from qlora_jax.training.held_out import distilled_metrics, held_out_metrics
from qlora_jax.training.loss_scale import LEAST, LOSS_SCALE, SKIPPED, LossScale, all_finite
from qlora_jax.training.metrics.memory_watch import memory_in_use
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.step_metrics import router_metrics, step_metrics
from qlora_jax.training.resume import EVALUATION_DUE, RECORDS, TrainState, checkpoint_state
from qlora_jax.training.rollout_step import draw_replies, held_out_batches, held_out_rewards, roll_out
from qlora_jax.training.session import Session
from qlora_jax.training.teacher.logprob_cache import TeacherError

FAILED_OUTSIDE = RewardError, TeacherError


@runtime_checkable
class TrainingReporter(Protocol):
    """Receives the records of a run, such as metrics.jsonl, the display and the trackers."""

    def step(self, record: Record) -> None:
        """Receives the record of one optimizer step."""
        ...

    def evaluation(self, record: Record) -> None:
        """Receives the held-out loss and the question metrics of a step."""
        ...

    def evaluation_progress(self, text: str) -> None:
        """Receives the progress of a running evaluation."""
        ...

    def samples(self, records: list[Record]) -> None:
        """Receives the replies to the sample prompts at a step."""
        ...

    def flush(self) -> Mapping[str, LinesDigest]:
        """Puts all records on the disk, before a checkpoint: a resumed run does not repeat the steps before it.

        Returns {file name: digest of its lines}.
        """
        ...


class _Stopped(Exception):
    """Raised within an evaluation when `stop()` returns True."""


class NonFiniteLoss(ValueError):
    """Raised when the loss or the gradient of a step is not finite; names the rows."""


def initial_state(session: Session) -> TrainState:
    """Returns the state at step 0."""
    lora, scale = session.parts.lora, LossScale() if session.run.gradients.is_scaled else None
    first = session.state_manager.init(lora), 0, dict(START), BestEvaluation(), scale
    return TrainState(lora, *first, evaluation_due=True)


def run_steps(
    session: Session,
    state: TrainState,
    checkpoints: Checkpoints,
    reporter: TrainingReporter,
    stop: Callable[[], bool],
    before_step: Callable[[], None] = lambda: None,
) -> TrainState:
    """Trains to the last step, or until `stop()` returns True or `train.patience` runs out; then saves a checkpoint.

    An evaluation in progress when `stop()` returns True is cut off, so that the checkpoint is saved without delay.

    Args:
      stop: called before each step, and again and again during an evaluation.
      before_step: called before each step; the profiler uses it.

    Raises:
      NonFiniteLoss: the loss or gradient is not finite; that step is not saved.
      CheckpointError: writing a checkpoint failed.
      PagingError: neither device nor host has room for the optimizer's state; that step is not saved.
    """
    settings = session.run.config.train
    if state.evaluation_due:
        state = evaluate(session, state, checkpoints, reporter, stop)
    together = 1 if session.run.inputs.rollouts is None else session.run.config.policy.steps_per_generation
    for batches, data_seconds in timed(
        itertools.batched(session.run.inputs.dataset.train_batches(state.position), together)
    ):
        if state.step >= session.run.total_steps or stop() or state.best.should_stop(settings.patience):
            break
        before_step()
        if session.run.inputs.rollouts is None:
            state = train_step(session, state, batches[0], data_seconds, reporter)
        else:
            try:
                state = _train_on_replies(session, state, batches, data_seconds, reporter, stop)
            except _Stopped:
                break
            except FAILED_OUTSIDE:  # a run with corrected functions or a teacher that replies resumes here
                save(session, state, checkpoints, reporter)
                raise
        if _is_evaluated(session, state.step):  # before the checkpoint, which then counts this evaluation as done
            state = evaluate(session, state, checkpoints, reporter, stop)
        if settings.save_every and state.step % settings.save_every == 0:
            save(session, state, checkpoints, reporter)
    save(session, state, checkpoints, reporter)
    return state


def _train_on_replies(
    session: Session,
    state: TrainState,
    prompts: Sequence[Batch],
    data_seconds: float,
    reporter: TrainingReporter,
    stop: Callable[[], bool],
) -> TrainState:
    """Samples replies to prompts, and takes the optimizer steps of their rollout phase.

    Raises:
      _Stopped: `stop()` returned True while replies were sampled, before any step.
    """
    state = _room_for(session, state, session.run.rollout_memory)
    left = session.run.total_steps - state.step
    passes = session.run.config.policy.num_iterations
    phase = roll_out if session.teacher is None else draw_replies
    steps = phase(session, state.lora, state.step, prompts[: -(-left // passes)], _progress(reporter, stop))
    runtime.give_memory_back()  # freed memory of the sampling is not held together with that of gradients
    for batch, record in steps:
        state = train_step(session, state, batch, data_seconds, reporter, record)
        data_seconds = 0.0
    for batch, _ in steps * (passes - 1):
        state = train_step(session, state, batch, 0.0, reporter)
    return state


def _progress(reporter: TrainingReporter, stop: Callable[[], bool]) -> Callable[[str], None]:
    """Returns a function that shows the progress, and raises _Stopped if `stop()` returns True."""

    def go_on(text: str = "") -> None:
        if stop():
            raise _Stopped
        if text:
            reporter.evaluation_progress(text)

    return go_on


def _is_evaluated(session: Session, step: int) -> bool:
    every = session.run.config.train.eval_every
    return step == session.run.total_steps or (every > 0 and step % every == 0)


def timed[T](batches: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Yields (batch, seconds waited for it)."""
    began = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - began
        began = time.perf_counter()


def train_step(
    session: Session,
    state: TrainState,
    batch: Batch,
    data_seconds: float,
    reporter: TrainingReporter,
    found: Mapping[str, object] = MappingProxyType({}),
) -> TrainState:
    """Runs one optimizer step and reports it.

    Args:
      data_seconds: time waited for the batch.
      found: further entries of the step's record.
    """
    began = time.perf_counter()
    batch = batch if session.teacher is None else session.teacher.attach(batch)
    key = None if session.dropout_key is None else jax.random.fold_in(session.dropout_key, state.step)
    optimizer_state, room, sent = session.state_manager.make_room(state.optimizer_state, batch.inputs.shape)
    arrays = place_batch(step_arrays(session.run.gradients.objective, batch), session.run.mesh)
    scale = state.loss_scale
    factor = None if scale is None else np.float32(scale.factor)
    parts = without_rounding(session.parts) if state.step < session.run.first_rounded else session.parts
    grads, loss = session.run.gradients(parts.with_lora(state.lora), arrays, key, factor)
    skipped = scale is not None and not all_finite(grads)
    if skipped:
        lora, norm, moved = state.lora, np.float32(np.inf), Transfers()
    else:
        lora, optimizer_state, norm, moved = session.state_manager.update(state.lora, optimizer_state, grads, room)
    total, count, row_losses_AB, norm = jax.device_get((loss.total, loss.count, loss.row_losses_AB, norm))
    tokens = int(batch.weights.sum())
    step = state.step + 1
    may_go_on = np.isfinite(norm) or (skipped and scale is not None and scale.factor > LEAST)
    if not (np.isfinite(total) and may_go_on):
        raise NonFiniteLoss(_non_finite(session, batch, step, row_losses_AB, float(norm)))
    seconds = time.perf_counter() - began
    reporter.step(
        {
            "step": step,
            "loss": float(total) / float(count),
            "learning_rate": float(np.asarray(session.run.schedule(state.step - (scale.skipped if scale else 0)))),
            **({SKIPPED: 1} if skipped else {"grad_norm": float(norm)}),
            **({} if scale is None else {LOSS_SCALE: scale.factor}),
            "supervised_tokens": tokens,
            "tokens": batch.tokens,
            "length": batch.inputs.shape[-1],
            "seconds": seconds,
            "data_seconds": data_seconds,
            **found,
        }
        | step_metrics(session.run.inputs.objective, unrouted(loss.outputs), batch.arrays())
        | router_metrics(loss.outputs, session.run.inputs.model.experts)
        | session.run.utilization.metrics(batch, tokens, seconds)
        | session.state_manager.metrics(optimizer_state, sent + moved)
        | _speed_of_devices(session, batch.tokens / seconds)
        | memory_in_use(local_devices(session.run.mesh))
    )
    assert batch.position is not None  # only evaluation batches have none
    scale = None if scale is None else scale.after(not skipped)
    return TrainState(lora, optimizer_state, step, batch.position, state.best, scale)


def _speed_of_devices(session: Session, tokens_per_second: float) -> Record:
    """Returns the entries of a step's record on several devices: tokens per second, in all and per device."""
    devices = mesh_size(session.run.mesh).devices
    if devices == 1:
        return {}
    return {
        "devices": devices,
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_device": tokens_per_second / devices,
    }


def _non_finite(session: Session, batch: Batch, step: int, row_losses_AB: np.ndarray, norm: float) -> str:
    bad = batch.rows[~np.isfinite(row_losses_AB)]
    rows, which = (bad, "rows with a loss that is not finite") if bad.size else (batch.rows, "rows of the step")
    places = [session.run.inputs.dataset.train.where(int(row)) for row in rows.reshape(-1) if row >= 0]
    steps = saved_steps(Path(session.run.config.output))
    saved = f"The checkpoint of step {steps[-1]} is from before" if steps else "No checkpoint was saved before"
    return (
        f"step {step}: the loss or its gradient is not finite (gradient norm {norm}); {which}: {', '.join(places)}. "
        f"{saved} this step. Check these rows, or lower optim.learning_rate."
    )


def evaluate(
    session: Session, state: TrainState, checkpoints: Checkpoints, reporter: TrainingReporter, stop: Callable[[], bool]
) -> TrainState:
    """Reports sample replies, the held-out loss and question metrics.

    Saves a checkpoint if the loss is the lowest so far and `train.keep_best` is set. If `stop()` returns True, it
    reports nothing and returns a state whose evaluation is due.
    """
    questions = session.run.inputs.questions
    if questions is not None:
        state = _room_for(session, state, questions.memory(session.parts.with_lora(state.lora)))
    state = _room_for(session, state, session.run.rollout_memory)
    due = dataclasses.replace(state, evaluation_due=True)
    try:
        replies, found = _measure(session, state, reporter, stop)
    except _Stopped:
        return due
    except FAILED_OUTSIDE:
        save(session, due, checkpoints, reporter)
        raise
    if replies:
        reporter.samples(replies)
    if found:
        reporter.evaluation({"step": state.step, **found})
    state = dataclasses.replace(state, evaluation_due=False)
    if session.run.inputs.dataset.eval is None:
        return state
    best = state.best.updated(state.step, found["eval_loss"])
    state = dataclasses.replace(state, best=best)
    if session.run.config.train.keep_best and best.step == state.step > 0:
        checkpoints.retain(best.step)
        save(session, state, checkpoints, reporter)
    return state


def _room_for(session: Session, state: TrainState, memory: ProgramMemory | None) -> TrainState:
    """Returns the state with so much of the optimizer's in host memory that a program has room, if it is paged."""
    if memory is None:
        return state
    optimizer_state, _, _ = session.state_manager.make_room(state.optimizer_state, memory.size)
    return dataclasses.replace(state, optimizer_state=optimizer_state)


def _measure(
    session: Session, state: TrainState, reporter: TrainingReporter, stop: Callable[[], bool]
) -> tuple[list[Record], dict[str, float]]:
    """Returns (the sample replies, the entries of the evaluation's record).

    Raises:
      _Stopped: `stop()` returned True.
    """
    go_on, parts = _progress(reporter, stop), session.parts.with_lora(state.lora)
    go_on("")
    replies = [] if session.run.inputs.samples is None else session.run.inputs.samples.replies(parts, state.step)
    found: dict[str, float] = {}
    if session.run.inputs.dataset.eval is not None and session.run.inputs.rollouts is not None:
        if session.teacher is None:
            shown, found = held_out_rewards(session, state.lora, state.step, go_on)
        else:
            shown, batches = held_out_batches(session, state.lora, state.step, go_on)
            found = distilled_metrics(session, state.lora, batches, lambda: go_on(""))
        replies = [*replies, *shown]
    elif session.run.inputs.dataset.eval is not None:
        found = held_out_metrics(session, state.lora, lambda: go_on(""))
    if session.run.inputs.questions is not None:
        found |= session.run.inputs.questions.metrics(parts, go_on)
    return replies, found


def save(session: Session, state: TrainState, checkpoints: Checkpoints, reporter: TrainingReporter) -> None:
    """Saves a checkpoint of `state`, after the records of the steps before it."""
    metadata = checkpoint_state(session, state.step, state.position, state.best)
    metadata[RECORDS] = reporter.flush()
    if state.evaluation_due:
        metadata[EVALUATION_DUE] = True
    if state.loss_scale is not None:
        metadata[LOSS_SCALE] = dataclasses.asdict(state.loss_scale)
    optimizer_state = session.state_manager.to_checkpoint(state.optimizer_state)
    checkpoints.save(state.step, state.lora, optimizer_state, metadata)
