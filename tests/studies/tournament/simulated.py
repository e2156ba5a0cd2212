"""Tournaments between systems of known strengths, and tournaments from tables of counts."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.games import BradleyTerryRatings
from qlora_jax.studies.tournament.ratings.mle import POINTS


def tournament(
    rng: np.random.Generator,
    strengths: Sequence[float],
    *,
    prompts: int,
    position: float = 0.0,
    tie_weight: float | None = None,
    prompt_sd: float = 0.0,
) -> list[Game]:
    """Every ordered pair of systems on every prompt, judged by Davidson's model.

    Args:
      strengths, position, tie_weight: of the model, in nats; without a tie weight nothing is a tie.
      prompt_sd: each system's strength differs between prompts by this much, for all its games on the prompt.
    """
    pairs = list(itertools.permutations(range(len(strengths)), 2))
    here = np.array(strengths) + rng.normal(0.0, 1.0, (prompts, len(strengths))) * prompt_sd
    x = np.stack([here[:, a] - here[:, b] + position for a, b in pairs], axis=1)
    outcomes = draw(rng, x, tie_weight)
    return [
        Game(f"prompt {prompt}", f"system {a}", f"system {b}", float(outcomes[prompt, pair]), "judge")
        for prompt in range(prompts)
        for pair, (a, b) in enumerate(pairs)
    ]


def draw(rng: np.random.Generator, x: np.ndarray, tie_weight: float | None) -> np.ndarray:
    """Outcomes of games whose log odds of first against second are x."""
    first, second = np.exp(x / 2), np.exp(-x / 2)
    tie = 0.0 if tie_weight is None else np.exp(tie_weight)
    at = rng.uniform(size=x.shape) * (first + second + tie)
    return np.where(at < first, 1.0, np.where(at < first + second, 0.0, 0.5))


def from_counts(counts: Mapping[tuple[str, str], tuple[int, int, int]]) -> list[Game]:
    """Comparisons from {(first, second): (first better, second better, ties)}, each on another prompt."""
    return [
        Game(f"{first}{second}{outcome}{number}", first, second, outcome, "judge")
        for (first, second), found in counts.items()
        for outcome, count in zip((1.0, 0.0, 0.5), found, strict=True)
        for number in range(count)
    ]


def strengths(ratings: BradleyTerryRatings) -> list[float]:
    """Strengths in nats, by the systems' names."""
    return [(rating.rating - 1000) / POINTS for rating in sorted(ratings.systems, key=lambda rating: rating.system)]
