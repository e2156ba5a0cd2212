"""The loop over optimizer steps: batches in, metrics and checkpoints out, and leaving cleanly at any boundary."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from qlora_jax.data.batching.batches import NO_ROW, START, Batch
from qlora_jax.io.checkpoint import Checkpoints
from qlora_jax.models.partition import Lora
from qlora_jax.training.checkpoint_state import check_resumable, checkpoint_state
from qlora_jax.training.early_stopping import BestEvaluation
from qlora_jax.training.eval_metrics import eval_loss_metrics
from qlora_jax.training.memory_watch import memory_in_use
from qlora_jax.training.session import Session
from qlora_jax.training.step import evaluation_loss

EVAL_ROWS = 8  # rows of an evaluation batch


@runtime_checkable
class Reporter(Protocol):
    """Where a run's numbers go."""

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step's numbers."""
        ...

    def evaluation(self, record: dict[str, Any]) -> None:
        """Held-out loss and answers to questions at a step."""
        ...

    def evaluation_progress(self, words: str) -> None:
        """How far an evaluation is."""
        ...

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Replies to prompts at a step."""
        ...


@dataclasses.dataclass
class TrainState:
    """Where a run stands: LoRA and optimizer state after `step` steps, the data position that comes next, and the best
    evaluation so far."""

    lora: Lora
    optimizer_state: Any  # as session.state_manager has it
    step: int
    position: dict[str, int]
    best: BestEvaluation


class NonFiniteLoss(ValueError):
    """The loss or the gradient of a step is not finite; the message names the rows."""


def initial_state(session: Session) -> TrainState:
    """Step 0."""
    return TrainState(
        session.parts.lora, session.state_manager.init(session.parts.lora), 0, dict(START), BestEvaluation()
    )


def restore(session: Session, checkpoints: Checkpoints) -> TrainState:
    """The newest checkpoint, checked against the session's settings, base and data."""
    check_resumable(session, checkpoints.read_state())
    lora, optimizer_state, state = checkpoints.restore(
        session.parts.lora, session.state_manager.checkpoint_template(session.parts.lora)
    )
    best = BestEvaluation.of(state)
    if session.config.train.keep_best:
        checkpoints.retain(best.step)
    return TrainState(
        lora, session.state_manager.from_checkpoint(optimizer_state), state["step"], state["position"], best
    )


def run_steps(
    session: Session,
    progress: TrainState,
    checkpoints: Checkpoints,
    reporter: Reporter,
    stop: Callable[[], bool],
    before_step: Callable[[], None] = lambda: None,
) -> TrainState:
    """Trains from `progress` to the last step, or until `stop()` is true or `train.patience` at an end at the end of a
    step; saves where it leaves.

    Raises:
      NonFiniteLoss: nothing of that step is saved.
      CheckpointError: a checkpoint could not be written.
      PagingError: optimizer state could be placed nowhere; nothing of that step is saved.
    """
    settings = session.config.train
    if progress.step == 0:
        progress = evaluate(session, progress, checkpoints, reporter)
    for batch, data_seconds in timed(session.dataset.train_batches(progress.position)):
        if progress.step >= session.total_steps or stop() or progress.best.should_stop(settings.patience):
            break
        before_step()
        progress = train_step(session, progress, batch, data_seconds, reporter)
        if _is_evaluated(session, progress.step):  # before it is saved, for a run that goes on from there has done it
            progress = evaluate(session, progress, checkpoints, reporter)
        if settings.save_every and progress.step % settings.save_every == 0:
            save(session, progress, checkpoints)
    save(session, progress, checkpoints)
    return progress


def _is_evaluated(session: Session, step: int) -> bool:
    every = session.config.train.eval_every
    return step == session.total_steps or (every > 0 and step % every == 0)


def timed[T](batches: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each batch, and the seconds that it was waited for."""
    began = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - began
        began = time.perf_counter()


def train_step(
    session: Session, progress: TrainState, batch: Batch, data_seconds: float, reporter: Reporter
) -> TrainState:
    """One optimizer step, reported once its numbers are known; `data_seconds` is what its batch was waited for."""
    began = time.perf_counter()
    key = None if session.dropout_key is None else jax.random.fold_in(session.dropout_key, progress.step)
    optimizer_state, room, sent = session.state_manager.make_room(progress.optimizer_state, batch.inputs.shape)
    grads, loss = session.gradients(session.parts.with_lora(progress.lora), batch.arrays(), key)
    lora, optimizer_state, norm, moved = session.state_manager.update(progress.lora, optimizer_state, grads, room)
    nll, tokens, row_nll_AB, norm = jax.device_get((loss.nll, loss.tokens, loss.row_nll_AB, norm))
    step = progress.step + 1
    if not (np.isfinite(nll) and np.isfinite(norm)):
        raise NonFiniteLoss(_non_finite(session, batch, step, row_nll_AB, float(norm)))
    seconds = time.perf_counter() - began
    reporter.step(
        {
            "step": step,
            "loss": float(nll) / float(tokens),
            "learning_rate": float(session.schedule(progress.step)),
            "grad_norm": float(norm),
            "supervised_tokens": int(tokens),
            "tokens": batch.tokens,
            "length": batch.inputs.shape[-1],
            "seconds": seconds,
            "data_seconds": data_seconds,
        }
        | session.utilization.metrics(batch, int(tokens), seconds)
        | session.state_manager.metrics(optimizer_state, sent + moved)
        | memory_in_use(jax.local_devices()[0])
    )
    assert batch.position is not None  # only batches of an evaluation have none
    return TrainState(lora, optimizer_state, step, batch.position, progress.best)


def _non_finite(session: Session, batch: Batch, step: int, row_nll_AB: np.ndarray, norm: float) -> str:
    bad = batch.rows[~np.isfinite(row_nll_AB)]
    rows, which = (bad, "rows with a loss that is not finite") if bad.size else (batch.rows, "rows of the step")
    places = [session.dataset.train.where(int(row)) for row in rows.reshape(-1) if row >= 0]
    return (
        f"step {step}: the loss or its gradient is not finite (gradient norm {norm}); {which}: {', '.join(places)}. "
        "The last checkpoint is from before this step. Look at these rows, or lower optim.learning_rate."
    )


def evaluate(session: Session, progress: TrainState, checkpoints: Checkpoints, reporter: Reporter) -> TrainState:
    """Reports samples, the held-out loss and what is right of the questions; where the loss is the least so far and the
    best are kept, saves a checkpoint."""
    parts = session.parts.with_lora(progress.lora)
    if session.samples is not None:
        reporter.samples(session.samples.replies(parts, progress.step))
    found = {} if session.dataset.eval is None else held_out_loss(session, progress)
    if session.questions is not None:
        needed = session.questions.memory(parts).size
        optimizer_state, _, _ = session.state_manager.make_room(progress.optimizer_state, needed)
        progress = dataclasses.replace(progress, optimizer_state=optimizer_state)
        found |= session.questions.metrics(parts, reporter.evaluation_progress)
    if found:
        reporter.evaluation({"step": progress.step, **found})
    if session.dataset.eval is None:
        return progress
    best = progress.best.after(progress.step, found["eval_loss"])
    progress = dataclasses.replace(progress, best=best)
    if session.config.train.keep_best and best.step == progress.step > 0:
        checkpoints.retain(best.step)
        save(session, progress, checkpoints)
    return progress


def held_out_loss(session: Session, progress: TrainState) -> dict[str, float]:
    """The loss of the held-out rows, weighed by tokens, as a record has it, with its 95 % interval (bootstrap)."""
    sums, tokens = [], []
    for batch in session.dataset.eval_batches(EVAL_ROWS):
        arrays = {name: array[0] for name, array in batch.arrays().items()}
        rows_B = evaluation_loss(session.parts.with_lora(progress.lora), arrays)
        there = batch.rows[0, :, 0] != NO_ROW
        sums.append(np.asarray(rows_B, np.float64)[there])
        tokens.append(batch.weights[0].sum(axis=1, dtype=np.int64)[there])
    return eval_loss_metrics(np.concatenate(sums), np.concatenate(tokens))


def save(session: Session, progress: TrainState, checkpoints: Checkpoints) -> None:
    """A checkpoint of `progress`."""
    state = checkpoint_state(session, progress.step, progress.position, progress.best)
    checkpoints.save(progress.step, progress.lora, session.state_manager.to_checkpoint(progress.optimizer_state), state)


@contextmanager
def stop_on_signals(told: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """`stop()`, true once SIGINT or SIGTERM came; a second SIGINT interrupts at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        told(f"{signal.Signals(number).name}: saving after this step; Ctrl-C again leaves at once, without saving")

    # Python sets signal handlers in the main thread only; elsewhere, signals stay with the program's own handlers.
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
