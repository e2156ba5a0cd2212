"""Where else a run's numbers go: TensorBoard's files, Weights & Biases. Each library is an extra.

Their names are settings' (`train.track`); what they are given are the records of metrics.jsonl.
"""

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Log = Callable[[int, Mapping[str, float]], None]  # (step, numbers by name)


@contextlib.contextmanager
def trackers(names: Sequence[str], run: Path, config: Mapping[str, Any], first_step: int) -> Iterator[Sequence[Log]]:
    """What takes each record of a run that has done `first_step` steps; closed when the block ends."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(TRACKERS[name](run, config, first_step)) for name in names]


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError with every library that these trackers need and that is not installed."""
    problems = [
        f"train.track: {name} needs {LIBRARIES[name]}, which is not installed: pip install 'qlora-jax[{name}]', or "
        "leave it out"
        for name in names
        if importlib.util.find_spec(LIBRARIES[name]) is None
    ]
    if problems:
        raise ValueError("\n".join(problems))


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Of a record: what can be drawn over steps."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextlib.contextmanager
def _tensorboard(run: Path, config: Mapping[str, Any], first_step: int) -> Iterator[Log]:
    """RUN/tensorboard, a file for each time that the run was started."""
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    with SummaryWriter(
        str(run / "tensorboard"), purge_step=first_step + 1 if first_step else None, filename_suffix=f".{first_step}"
    ) as writer:

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log


@contextlib.contextmanager
def _wandb(run: Path, config: Mapping[str, Any], first_step: int) -> Iterator[Log]:
    """A run of Weights & Biases, the same one when the run goes on; its own settings and environment hold."""
    import wandb  # pyright: ignore[reportMissingImports]

    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    settings = {"id": identity, "resume": "allow", "name": run.name, "config": dict(config), "dir": str(run)}
    tracked = wandb.init(project="qlora_jax", **settings)
    try:
        yield lambda step, values: tracked.log(dict(values), step=step)
    finally:
        tracked.finish()


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
