"""What a checkpoint says besides its arrays, and whether a run may go on from it."""

import dataclasses
from typing import Any

import jax
import jaxlib
import optax
import orbax.checkpoint

from qlora_jax.config import Config, QuestionArgs, differences, plain_name, to_dict
from qlora_jax.config.parse import from_dict
from qlora_jax.training.early_stopping import BestEvaluation
from qlora_jax.training.session import Session

# Settings that may differ when a run goes on: they change nothing that is computed, or what they name is checked by
# its content (base and data have fingerprints).
MAY_DIFFER = {
    "model.path",
    "data.train",
    "data.eval",
    "data.cache",
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
    *(f"questions.{field.name}" for field in dataclasses.fields(QuestionArgs)),
}


# What a run needs of a checkpoint's state.
GOES_ON_FROM = ("position", "best", "fingerprint", "data_fingerprint", "config")


def checkpoint_state(session: Session, step: int, position: dict[str, int], best: BestEvaluation) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {
        "step": step,
        "position": position,
        "window_order": session.dataset.window_order(position["epoch"]),
        "best": dataclasses.asdict(best),
        "fingerprint": session.fingerprint,
        "data_fingerprint": session.dataset.fingerprint,
        "config": to_dict(session.config),
        "versions": {m.__name__: m.__version__ for m in (jax, jaxlib, optax, orbax.checkpoint)},
    }


def _needed(session: Session) -> tuple[str, ...]:
    """There was a version that went through windows in the file's order, and said nothing of it."""
    return GOES_ON_FROM if session.dataset.train.windows == 1 else (*GOES_ON_FROM, "window_order")


def _unpaged(config: Config) -> Config:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=plain_name(config.optim.name)))


def check_resumable(session: Session, state: dict[str, Any]) -> None:
    """Passes where going on gives what an uninterrupted run would have given.

    Raises:
      ValueError: each setting that differs, another base, other data; a checkpoint that lacks what a run goes on from.
    """
    if missing := [name for name in _needed(session) if name not in state]:
        raise ValueError(
            f"{session.config.output}: its checkpoint of step {state['step']} lacks {', '.join(missing)}, since "
            "another version of qlora_jax wrote it, so the run can't go on from it. Go on with that version, or train "
            "anew in another output folder; lora.start goes on from the exported adapter."
        )
    changed = differences(*map(_unpaged, (from_dict(Config, state["config"], {}), session.config)))
    problems = [f"{key}: {then!r} then, {now!r} now" for key, (then, now) in changed.items() if key not in MAY_DIFFER]
    if session.fingerprint != state["fingerprint"]:
        problems.append(
            f"the base model: fingerprint {state['fingerprint'][:12]} then, {session.fingerprint[:12]} now "
            f"({session.config.model.path}; then {state['config']['model']['path']})"
        )
    if session.dataset.fingerprint != state["data_fingerprint"]:
        problems.append(f"the training rows as tokens, in {session.config.data.train}")
    elif "window_order" in state and state["window_order"] != (
        now := session.dataset.window_order(epoch := state["position"]["epoch"])
    ):
        problems.append(f"windows of epoch {epoch} came in the order {state['window_order']} then, {now} now")
    if problems:
        raise ValueError(
            f"{session.config.output}: its checkpoint of step {state['step']} was made otherwise, so the run "
            "can't go on from it:\n  " + "\n  ".join(problems) + "\nGive the same settings, or another output folder."
        )
