"""How far a score can be trusted: intervals, and tests between two models that were scored on the same rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The shares p for which |successes / trials - p| <= 1.96 sqrt(p (1 - p) / trials): 95 % (Wilson 1927)."""
    share, spread = successes / trials, Z_95**2 / trials
    middle = share + spread / 2
    half = Z_95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def mcnemar(a: Bool[np.ndarray, " rows"], b: Bool[np.ndarray, " rows"]) -> float:
    """Two-sided exact p-value that models right on rows `a` and on rows `b` are equally good (McNemar).

    Only rows that one of them has right count: under equality either is the one by a fair coin.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    trials = only_a + only_b
    tail = sum(math.comb(trials, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**trials))


def bootstrap(sums: Float64[np.ndarray, " rows"], tokens: Int64[np.ndarray, " rows"]) -> tuple[float, float]:
    """95 % interval of (sum of sums) / (sum of tokens), rows drawn as `paired_bootstrap` draws them."""
    return paired_bootstrap(np.zeros(len(sums)), sums, tokens)


def stratified_bootstrap(right: Bool[np.ndarray, " rows"], subjects: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the mean of the subjects' shares, each drawn again 10,000 times from its own rows, seed 0.

    A subject with n rows, k of them right, gives a binomial draw of n rows with share k / n.
    """
    names, rng = np.array(subjects), np.random.default_rng(0)
    of_each = [right[names == name] for name in sorted(set(subjects))]
    draws = [rng.binomial(len(rows), rows.mean(), size=10_000) / len(rows) for rows in of_each]
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    return float(low), float(high)


def stratified_paired_bootstrap(
    before: Bool[np.ndarray, " rows"], after: Bool[np.ndarray, " rows"], subjects: Sequence[str]
) -> tuple[float, float]:
    """95 % interval of the change of that mean: each subject's pairs are drawn again 10,000 times, seed 0.

    Of a subject's n pairs, those that got worse, stayed and got better give a multinomial draw.
    """
    names, rng = np.array(subjects), np.random.default_rng(0)
    changes = after.astype(np.int64) - before
    of_each = [changes[names == name] for name in sorted(set(subjects))]
    draws = [
        rng.multinomial(len(rows), [(rows == kind).mean() for kind in (-1, 0, 1)], size=10_000) @ (-1, 0, 1) / len(rows)
        for rows in of_each
    ]
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    return float(low), float(high)


def paired_bootstrap(
    a: Float64[np.ndarray, " rows"], b: Float64[np.ndarray, " rows"], tokens: Int64[np.ndarray, " rows"]
) -> tuple[float, float]:
    """95 % interval of (sum of b - sum of a) / (sum of tokens), rows drawn with replacement 10,000 times, seed 0.

    Args:
      a, b: two models' sums over each row, of -log p for instance.
    """
    changes = np.concatenate([(draws @ (b - a)) / (draws @ tokens) for draws in _draws(len(a))])
    low, high = np.quantile(changes, (0.025, 0.975))
    return float(low), float(high)


def paired_bootstrap_of(
    before: Float64[np.ndarray, "rows 2"], after: Float64[np.ndarray, "rows 2"], of_mean: Callable[[Any], Any]
) -> tuple[float, float]:
    """95 % interval of of_mean(after's mean) - of_mean(before's mean), rows drawn as `paired_bootstrap` draws them.

    Args:
      before, after: each row's value and weight; a mean is (sum of values) / (sum of weights).
    """
    sums = np.concatenate([np.hstack([draws @ before, draws @ after]) for draws in _draws(len(before))])
    changes = of_mean(sums[:, 2] / sums[:, 3]) - of_mean(sums[:, 0] / sums[:, 1])
    low, high = np.quantile(changes, (0.025, 0.975))
    return float(low), float(high)


def _draws(rows: int) -> Iterator[Int64[np.ndarray, "some rows"]]:
    """How often each row is in each of 10,000 samples of as many rows, some samples at a time: never gigabytes."""
    rng, shares = np.random.default_rng(0), np.full(rows, 1 / rows)
    for _ in range(100):
        yield rng.multinomial(rows, shares, size=100)
