"""Simulates how often 95 % intervals of a loss per token contain the truth, for several methods.

    python -m scripts.interval_coverage [--trials 500] [--rows 8 100]

A row has a log-normal number of tokens and, independently, a mean loss: gamma for `light` tails (a coefficient of
variation of 0.5), log-normal for `medium` (0.95) and `heavy` ones (1.8). Prints a Markdown table.
"""

import argparse

import numpy as np
from jaxtyping import Float64
from scipy import special

from qlora_jax.measures.statistics import bootstrap_t, ratio, resample_counts
from qlora_jax.studies.statistics import crossed_mean, ratio_scores

Tables = Float64[np.ndarray, "trials rows 2"]  # each row's loss, summed over its tokens, and its number of tokens
SPREADS = {"light": 0.5, "medium": 0.8, "heavy": 1.2}  # the standard deviation of the logarithm of a row's tokens
METHODS = ("percentiles", "BCa", "Student", "bootstrap-t")


def simulated(tail: str, trials: int, rows: int, rng: np.random.Generator) -> tuple[Tables, float]:
    """Returns (the rows of each trial, the true loss per token)."""
    spread, light = SPREADS[tail], tail == "light"
    tokens = np.maximum(1.0, np.round(rng.lognormal(3.5, spread, (trials, rows))))
    losses = rng.gamma(4.0, 0.5, tokens.shape) if light else rng.lognormal(0.0, spread, tokens.shape)
    return np.stack([losses * tokens, tokens], axis=2), 2.0 if light else float(np.exp(spread**2 / 2))


def percentiles_and_bca(table_R2: np.ndarray, draws_SR: np.ndarray) -> list[np.ndarray]:
    """Returns the interval between percentiles, and that of BCa (Efron 1987)."""
    samples, mean = np.sort(ratio(draws_SR @ table_R2)), ratio(table_R2.sum(axis=0, keepdims=True))
    left_out_R = ratio(table_R2.sum(axis=0) - table_R2)
    influence_R = left_out_R.mean() - left_out_R
    skew = (influence_R**3).sum() / (6 * (influence_R**2).sum() ** 1.5)
    bias, ends = special.ndtri(np.searchsorted(samples, mean) / len(samples)), special.ndtri((0.025, 0.975))
    levels = special.ndtr(bias + (bias + ends) / (1 - skew * (bias + ends)))
    return [np.quantile(samples, (0.025, 0.975)), np.quantile(samples, levels)]


def coverage(trials_TR2: Tables, truth: float) -> np.ndarray:
    """Returns the share of trials whose interval contains the truth, by method."""
    draws_SR = np.concatenate([*resample_counts(trials_TR2.shape[1])]).astype(np.float64)
    student = [crossed_mean(ratio_scores(one[None, :, 0], one[:, 1])).interval for one in trials_TR2]
    others = [percentiles_and_bca(one, draws_SR) for one in trials_TR2]
    used = bootstrap_t([*trials_TR2], ratio)
    ends_TM2 = np.array([[*pair, each, interval] for pair, each, interval in zip(others, student, used, strict=True)])
    return ((ends_TM2[..., 0] <= truth) & (truth <= ends_TM2[..., 1])).mean(axis=0)


def main() -> None:
    """Prints a line for each kind of tails and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32, 64, 100, 400])
    args, rng = parser.parse_args(), np.random.default_rng(0)
    print(f"| tails | rows | {' | '.join(METHODS)} |\n|---|---|{'---|' * len(METHODS)}")
    for tail in SPREADS:
        for rows in args.rows:
            shares = coverage(*simulated(tail, args.trials, rows, rng))
            print(f"| {tail} | {rows} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
