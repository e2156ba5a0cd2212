"""The measures that compare runs row by row: each is a ratio of sums over rows (`metrics.RowValues`)."""

from typing import Literal

Better = Literal["higher", "lower"]

# By the setting that names a task's file, then by measure. A task with an entry here has `row_values` (task.py).
MEASURES: dict[str, dict[str, Better]] = {
    "text": {"loss per token": "lower"},
    "rows": {"loss per token": "lower", "begins with the answer": "higher", "is exactly the answer": "higher"},
    "choices": {"right by likelihood": "higher", "right by likelihood per token": "higher"},
    "letters": {"right by letter": "higher"},
    "labels": {"right label": "higher"},
    "pairs": {
        "right by reward": "higher",
        "reward margin": "higher",
        "right by likelihood": "higher",
        "right by likelihood per token": "higher",
    },
    "answers": {"exactly the answer": "higher"},
    "programs": {"pass@1": "higher"},
}
# The measures of runs that trained a sequence head, by objective and task.
HEAD_MEASURES: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {"labels": ("right label",)},
    "multi_label": {"labels": ("right label",)},
    "regression": {},
    "reward": {"pairs": ("right by reward", "reward margin")},
    "embedding": {},
}


def measures_of(objective: str) -> dict[str, tuple[str, ...]]:
    """Returns the measures of a run with this objective, by task."""
    with_head = {name: measures for name, measures in HEAD_MEASURES.items() if name == objective}
    return with_head.get(objective, {task: tuple(measures) for task, measures in MEASURES.items()})
