"""The measures that compare runs row by row: each is a ratio of sums over rows (`metrics.RowValues`)."""

from typing import Literal

Better = Literal["higher", "lower"]

# By the setting that names a task's file, then by measure. A task with an entry here has `row_values` (tasks/task.py).
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
