"""Student's interval against SciPy, and against the figures of the first sweep."""

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qlora_jax.measures.statistics import t_interval, two_sided_p

ROOT = Path(__file__).resolve().parents[2]


def test_equals_scipy():
    values = np.random.default_rng(0).normal(size=7).tolist()
    expected = stats.t.interval(0.95, 6, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(expected, rel=1e-12)
    assert two_sided_p(-2.5, 3.7) == pytest.approx(2 * stats.t.sf(2.5, 3.7), rel=1e-12)


def test_one_value_has_none():
    assert t_interval([1.0]) is None


def published(name: str) -> list[list[tuple[float, float]]]:
    """Returns the (mean, half-width) pairs of each row of a table of docs/results.md; the section is found by title."""
    section = (ROOT / "docs/results.md").read_text().partition(f"## {name}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    pair = re.compile(r"([-+]?[\d.]+) ± ([\d.]+)")
    return [[(float(mean), float(half)) for cell in row for mean, half in pair.findall(cell)] for row in rows]


def test_the_first_sweeps_means_and_intervals_follow_from_its_values():
    results = json.loads((ROOT / "docs/sweep_titles.json").read_text())["results"]
    table = published("Rank, placement, code, and full finetuning")
    assert len(table) == len(results) == 11
    first = next(iter(results.values()))["loss per token"]
    for row, (cell, measures) in zip(table, results.items(), strict=True):
        losses = measures["loss per token"]
        differences = [a - b for a, b in zip(losses, first, strict=True)]
        shares = [100 * share for share in measures["is exactly the answer"]]
        expected = [losses, *([] if cell == "as configured" else [differences]), shares]
        for (mean, half), values, digits in zip(row, expected, (3, 3, 1) if len(row) == 3 else (3, 1), strict=True):
            low, high = t_interval(values)
            assert math.isclose(mean, statistics.fmean(values), abs_tol=0.51 * 10**-digits)
            assert math.isclose(half, (high - low) / 2, abs_tol=0.51 * 10**-digits)
