"""Confidence intervals of scores, and tests between two models that were scored on the same rows.

SciPy has Wilson intervals and exact binomial tests too. They are computed here because importing `scipy.stats` takes
about as long as importing JAX; a test compares them with SciPy's.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

Z_95 = 1.959963984540054
SAMPLES = 10_000  # bootstrap samples
FEW_ROWS = 8  # below, the t of a bootstrap is often that of two rows alone

Weights = Float64[np.ndarray, " rows"] | Int64[np.ndarray, " rows"]  # such as each row's number of tokens


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a share: the p with |successes / trials - p| <= 1.96 sqrt(p (1 - p) / trials) (Wilson 1927)."""
    share, spread = successes / trials, Z_95**2 / trials
    middle = share + spread / 2
    half = Z_95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def mean_interval(values: Float64[np.ndarray, " rows"]) -> tuple[float, float]:
    """95 % interval of the mean of values from 0 to 1, which has a width even if all of them are equal.

    That of Agresti and Coull (1998) for shares, with sums in place of counts: it adds z^2 / 2 rows of 0 and as many
    of 1. A bootstrap covers too little if most values are 0 or 1.
    """
    low, high = _with_rows(values, Z_95**2 / 2, Z_95**2 / 2)
    return max(0.0, low), min(1.0, high)


def mean_change_interval(changes: Float64[np.ndarray, " rows"]) -> tuple[float, float]:
    """95 % interval of the mean of paired changes from -1 to 1, which has a width even if all of them are equal.

    That of Agresti and Min (2005) for shares, with sums in place of counts: it adds half a row of each of the four
    outcomes of a pair, of which two change nothing.
    """
    low, high = _with_rows(changes, 0.5, 0.5, lowest=-1.0, unchanged=1.0)
    return max(-1.0, low), min(1.0, high)


def _with_rows(
    values: Float64[np.ndarray, " rows"], low: float, high: float, *, lowest: float = 0.0, unchanged: float = 0.0
) -> tuple[float, float]:
    """Returns the normal interval of the mean after adding rows: `low` of `lowest`, `high` of 1, `unchanged` of 0."""
    rows = len(values) + low + high + unchanged
    mean = (values.sum() + low * lowest + high) / rows
    variance = (np.square(values).sum() + low * lowest**2 + high) / rows - mean**2
    half = Z_95 * math.sqrt(variance / rows)
    return float(mean - half), float(mean + half)


def mcnemar(a: Bool[np.ndarray, " rows"], b: Bool[np.ndarray, " rows"]) -> float:
    """Two-sided exact p-value of the hypothesis that two models are equally good (McNemar 1947).

    Only rows that exactly one model has right count. If the models are equally good, a fair coin decides which one.

    Args:
      a, b: which rows each model has right.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    trials = only_a + only_b
    tail = sum(math.comb(trials, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**trials))


def bootstrap(sums: Float64[np.ndarray, " rows"], tokens: Weights) -> tuple[float, float]:
    """95 % interval of (sum of sums) / (sum of tokens), as `bootstrap_t` computes it; from 0 if no sum is negative."""
    low, high = paired_bootstrap(np.zeros(len(sums)), sums, tokens)
    return (max(0.0, low) if sums.min() >= 0 else low), high


def stratified_bootstrap(right: Bool[np.ndarray, " rows"], subjects: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the mean of the subjects' shares; each subject's rows are resampled 10,000 times, seed 0.

    Resampling a subject of n rows, k of them right, is a binomial draw of n trials with probability k / n.
    """
    names, rng = np.array(subjects), np.random.default_rng(0)
    by_subject = [right[names == name] for name in sorted(set(subjects))]
    draws = [rng.binomial(len(rows), rows.mean(), size=SAMPLES) / len(rows) for rows in by_subject]
    return _interval(np.mean(draws, axis=0))


def stratified_paired_bootstrap(
    before: Bool[np.ndarray, " rows"], after: Bool[np.ndarray, " rows"], subjects: Sequence[str]
) -> tuple[float, float]:
    """95 % interval of the change of the mean of the subjects' shares between two models, 10,000 samples, seed 0.

    Resampling a subject's n pairs is a multinomial draw of the pairs that got worse, stayed and got better.
    """
    names, rng = np.array(subjects), np.random.default_rng(0)
    changes = after.astype(np.int64) - before
    by_subject = [changes[names == name] for name in sorted(set(subjects))]
    draws = [
        rng.multinomial(len(rows), [(rows == kind).mean() for kind in (-1, 0, 1)], size=SAMPLES)
        @ (-1, 0, 1)
        / len(rows)
        for rows in by_subject
    ]
    return _interval(np.mean(draws, axis=0))


def paired_bootstrap(
    a: Float64[np.ndarray, " rows"], b: Float64[np.ndarray, " rows"], tokens: Weights
) -> tuple[float, float]:
    """95 % interval of (sum of b - sum of a) / (sum of tokens), as `bootstrap_t` computes it.

    Args:
      a, b: each model's sum over the tokens of each row, for instance of -log p.
      tokens: number of tokens of each row.
    """
    (interval,) = bootstrap_t([np.stack([b - a, tokens], axis=1)], ratio)
    return interval


def paired_bootstrap_of(
    before: Float64[np.ndarray, "rows 2"],
    after: Float64[np.ndarray, "rows 2"],
    metric_of_mean: Callable[[np.ndarray], np.ndarray],
) -> tuple[float, float]:
    """95 % interval of metric_of_mean(after's mean) - metric_of_mean(before's mean), as `bootstrap_t` computes it.

    Args:
      before, after: each row's value and weight; the mean is (sum of values) / (sum of weights).
    """

    def change(sums: np.ndarray) -> np.ndarray:
        return metric_of_mean(ratio(sums[:, 2:])) - metric_of_mean(ratio(sums))

    (interval,) = bootstrap_t([np.hstack([before, after])], change)
    return interval


def ratio(sums: np.ndarray) -> np.ndarray:
    """Returns the mean of each sample from its sums of values and of weights."""
    return sums[:, 0] / sums[:, 1]


def bootstrap_t(
    tables: Sequence[Float64[np.ndarray, "rows columns"]], statistic: Callable[[np.ndarray], np.ndarray]
) -> list[tuple[float, float]]:
    """95 % intervals of a statistic of each table: rows are resampled 10,000 times, seed 0, the same for all tables.

    The quantiles are those of t = (the sample's statistic - the statistic) / the sample's standard error (Efron and
    Tibshirani 1993, chapter 12). Unlike percentiles, they widen for few rows and lean to the side of long tails. Below
    8 rows, and where many samples are almost without spread, Student's quantiles take their place.
    `python -m scripts.interval_coverage` simulates how often the intervals contain the truth.

    Args:
      statistic: from the sums of each column, [samples, columns], to [samples]; a formula that takes complex numbers,
        too, and whose result is the same for multiples of the sums. Samples where it is not finite are left out.
    """
    rows = len(tables[0])
    whole = [_with_error(np.ones((1, rows)), table, statistic) for table in tables]
    draws = (counts.astype(np.float64) for counts in resample_counts(rows))
    samples = [[_with_error(each, table, statistic) for table in tables] for each in draws]
    by_table = zip(whole, zip(*samples, strict=True), strict=True)
    return [_t_interval(rows, one[:, 0], np.concatenate(each, axis=1)) for one, each in by_table]


def _with_error(
    draws: Float64[np.ndarray, "samples rows"],
    table: Float64[np.ndarray, "rows columns"],
    statistic: Callable[[np.ndarray], np.ndarray],
) -> Float64[np.ndarray, "2 samples"]:
    """Returns the statistic of each sample, and its standard error by the delta method.

    A derivative is the imaginary part of the statistic after a tiny imaginary step.
    """
    sums, step = draws @ table, 1e-30
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient = [np.imag(statistic(sums + 1j * step * column)) / step for column in np.eye(table.shape[1])]
        influence = np.stack(gradient, axis=1) @ table.T
        return np.stack([statistic(sums), np.sqrt(np.einsum("sr,sr->s", draws, np.square(influence, out=influence)))])


def _t_interval(
    rows: int, whole: Float64[np.ndarray, "2"], samples: Float64[np.ndarray, "2 samples"]
) -> tuple[float, float]:
    value, error = whole
    if not error > 1e-12 * abs(value):  # also one row, or values that are not finite
        return float(value), float(value)
    values, errors = samples[:, np.isfinite(samples[0])]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(errors > 1e-3 * error, (values - value) / errors, np.copysign(np.inf, values - value))
    low, high = np.quantile(t, (0.025, 0.975), method="inverted_cdf")
    if rows < FEW_ROWS or not np.isfinite([low, high]).all():
        high = t_quantile(rows - 1) * math.sqrt(rows / (rows - 1))
        low = -high
    return float(value - high * error), float(value - low * error)


def _interval(samples: Float64[np.ndarray, " samples"]) -> tuple[float, float]:
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(low), float(high)


def resample_counts(rows: int) -> Iterator[Int64[np.ndarray, "some rows"]]:
    """Yields how often each row occurs in each bootstrap sample, 100 samples at a time to bound memory."""
    rng, shares = np.random.default_rng(0), np.full(rows, 1 / rows)
    for _ in range(SAMPLES // 100):
        yield rng.multinomial(rows, shares, size=100)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % interval mean -+ t s / sqrt(n); None for one value."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(degrees_of_freedom: float) -> float:
    """Returns the 0.975 quantile of Student's distribution."""
    from scipy import special  # takes as long to import as JAX

    return float(special.stdtrit(degrees_of_freedom, 0.975))


def two_sided_p(t: float, degrees_of_freedom: float) -> float:
    """Returns the probability that Student's t is at least as far from 0."""
    from scipy import special

    return float(2 * special.stdtr(degrees_of_freedom, -abs(t)))
