"""Elo ratings as in the QLoRA paper: K = 32, start at 1000, mean over random orderings of all comparisons.

A rating depends on the order of the games, so one ordering is one draw from a wide distribution. The mean over
orderings is precise, but that says nothing about other prompts: its interval is Student's, with the standard error of a
bootstrap over prompts.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from qlora_jax.measures.statistics import t_quantile
from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.games import EloRating, EloRatings, Games, check_several_prompts, read_games

START, K, SCALE = 1000.0, 32.0, 400.0
RESAMPLES, ORDERINGS_OF_RESAMPLE = 400, 25
_AT_ONCE = 2_000  # orderings, to bound memory


def elo_ratings(comparisons: Sequence[Game], *, orderings: int = 10_000, seed: int = 0) -> EloRatings:
    """Rates the systems of a tournament.

    Args:
      orderings: number of random orderings of the comparisons.

    Raises:
      ValueError: there is one prompt, or a comparison is malformed.
    """
    games, rng = read_games(comparisons), np.random.default_rng(seed)
    check_several_prompts(games)
    final_OS = ratings_by_ordering(games, orderings, rng)
    mean_S = final_OS.mean(axis=0)
    half_S = t_quantile(len(games.prompts) - 1) * prompt_errors(games, rng)
    low_S, high_S = np.quantile(final_OS, (0.025, 0.975), axis=0)
    systems = [
        EloRating(
            system=games.systems[index],
            rating=float(mean_S[index]),
            interval=(float(mean_S[index] - half_S[index]), float(mean_S[index] + half_S[index])),
            ordering_sd=float(final_OS[:, index].std()),
            ordering_range=(float(low_S[index]), float(high_S[index])),
        )
        for index in np.argsort(-mean_S, kind="stable")
    ]
    return EloRatings(systems=systems, comparisons=len(comparisons), prompts=len(games.prompts), orderings=orderings)


def ratings_by_ordering(
    games: Games, orderings: int, rng: np.random.Generator
) -> Float64[np.ndarray, "orderings systems"]:
    """Final ratings after all games, for uniformly random orderings."""
    in_order = np.arange(len(games.outcome), dtype=np.int32)
    sizes = [min(_AT_ONCE, orderings - done) for done in range(0, orderings, _AT_ONCE)]
    return np.concatenate(
        [play(games, rng.permuted(np.tile(in_order, (size, 1)), axis=1)) for size in sizes],
    )


def prompt_errors(games: Games, rng: np.random.Generator) -> Float64[np.ndarray, " systems"]:
    """Standard error over prompts of the mean rating over orderings.

    Each of 400 resamples draws prompts with replacement, with all their games, and averages over 25 orderings. The
    variance between resamples also holds 1/25 of the variance within them, which is subtracted.
    """
    by_prompt = [np.flatnonzero(games.prompt == prompt).astype(np.int32) for prompt in range(len(games.prompts))]
    at_once = _AT_ONCE // ORDERINGS_OF_RESAMPLE
    final_ROS = np.concatenate([_resampled(games, by_prompt, at_once, rng) for _ in range(0, RESAMPLES, at_once)])
    between_S = final_ROS.mean(axis=1).var(axis=0, ddof=1)
    within_S = final_ROS.var(axis=1, ddof=1).mean(axis=0)
    return np.sqrt(np.maximum(between_S - within_S / ORDERINGS_OF_RESAMPLE, 0.0))


def _resampled(
    games: Games, by_prompt: Sequence[Int[np.ndarray, " _"]], resamples: int, rng: np.random.Generator
) -> Float64[np.ndarray, "resamples orderings systems"]:
    """Final ratings of several resamples of the prompts; -1 pads resamples that have fewer games."""
    prompts = len(by_prompt)
    drawn = [np.concatenate([by_prompt[p] for p in rng.integers(prompts, size=prompts)]) for _ in range(resamples)]
    schedule_RG = np.full((resamples, max(map(len, drawn))), -1, np.int32)
    for row, games_of_row in zip(schedule_RG, drawn, strict=True):
        row[: len(games_of_row)] = games_of_row
    shuffled = rng.permuted(np.repeat(schedule_RG, ORDERINGS_OF_RESAMPLE, axis=0), axis=1)
    return play(games, shuffled).reshape(resamples, ORDERINGS_OF_RESAMPLE, len(games.systems))


def play(games: Games, schedule_OG: Int[np.ndarray, "orderings games"]) -> Float64[np.ndarray, "orderings systems"]:
    """Ratings after all games of each ordering, played at the same time; index -1 is a game that changes nothing."""
    orderings = len(schedule_OG)
    first, second, outcome = (np.append(column, 0) for column in (games.first, games.second, games.outcome))
    gain = np.append(np.full(len(games.outcome), K), 0.0)
    ratings, lanes = np.full(len(games.systems) * orderings, START), np.arange(orderings)
    for game_O in np.ascontiguousarray(schedule_OG.T):
        a_O, b_O = first[game_O] * orderings + lanes, second[game_O] * orderings + lanes
        expected_O = 1 / (1 + np.exp((ratings[b_O] - ratings[a_O]) * (math.log(10) / SCALE)))
        change_O = gain[game_O] * (outcome[game_O] - expected_O)
        ratings[a_O] += change_O
        ratings[b_O] -= change_O
    return ratings.reshape(-1, orderings).T
