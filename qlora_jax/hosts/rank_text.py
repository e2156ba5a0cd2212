"""Texts about processes."""

from collections import defaultdict
from collections.abc import Sequence


def ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers as text, runs shortened: `0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def grouped(values: Sequence[str]) -> str:
    """Returns each value with the processes that have it: `4 in processes 0-2, 8 in process 3`."""
    owners: dict[str, list[int]] = defaultdict(list)
    for process, value in enumerate(values):
        owners[value].append(process)
    return "; ".join(f"{value} in {numbered(numbers)}" for value, numbers in owners.items())


def numbered(numbers: Sequence[int]) -> str:
    """Returns ascending process numbers as text: `process 3`, or `processes 0-2, 5`."""
    return f"process{'es' if len(numbers) > 1 else ''} {ranges(numbers)}"
