"""Experiment trackers (TensorBoard, Weights & Biases) that receive the records of metrics.jsonl.

`train.track` selects them; each library is an optional extra.
"""

import contextlib
import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from qlora_jax.training.time_limit import finishes_within

CLOSING_SECONDS = 120.0

Log = Callable[[int, Mapping[str, float]], None]  # (step, numbers by name)


@contextlib.contextmanager
def trackers(names: Sequence[str], run: Path, config: Mapping[str, object], first_step: int) -> Iterator[Sequence[Log]]:
    """Yields a log function per tracker, for a run that has done `first_step` steps; closes them at the end.

    Closing is given up after CLOSING_SECONDS, with a warning, because a tracker may wait for a network that is down.
    """
    opened = contextlib.ExitStack()
    try:
        yield [opened.enter_context(TRACKERS[name](run, config, first_step)) for name in names]
    finally:
        if not finishes_within(CLOSING_SECONDS, opened.close):
            warnings.warn(
                f"train.track: {', '.join(names)} not closed within {CLOSING_SECONDS:g} s, so the last numbers may be "
                f"missing there. {run} has all of them; `wandb sync` uploads what wandb has stored in it",
                stacklevel=3,
            )


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError that lists the libraries of these trackers that are not installed."""
    problems = [
        f"train.track: {name} needs {LIBRARIES[name]}, which is not installed. "
        f"Run pip install 'qlora-jax[{name}]', or leave {name} out."
        for name in names
        if importlib.util.find_spec(LIBRARIES[name]) is None
    ]
    if problems:
        raise ValueError("\n".join(problems))


def scalars(record: Mapping[str, object]) -> dict[str, float]:
    """Returns the numbers of a record that can be plotted over steps."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextlib.contextmanager
def _tensorboard(run: Path, config: Mapping[str, object], first_step: int) -> Iterator[Log]:
    """Logs to RUN/tensorboard, in a new file each time the run starts or resumes."""
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    with SummaryWriter(
        str(run / "tensorboard"), purge_step=first_step + 1 if first_step else None, filename_suffix=f".{first_step}"
    ) as writer:

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log


@contextlib.contextmanager
def _wandb(run: Path, config: Mapping[str, object], first_step: int) -> Iterator[Log]:
    """Logs to a Weights & Biases run, the same one on resume; wandb's environment variables apply."""
    import wandb  # pyright: ignore[reportMissingImports]

    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    tracked = wandb.init(
        project="qlora_jax", id=identity, resume="allow", name=run.name, config=dict(config), dir=str(run)
    )
    try:
        yield lambda step, values: tracked.log(dict(values), step=step)
    finally:
        tracked.finish()


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
