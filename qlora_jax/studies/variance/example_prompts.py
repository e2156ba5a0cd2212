"""Chooses the prompts that the page shows by a stated rule, never by hand."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64


class ChosenPrompt(NamedTuple):
    """A prompt to show: its index, and the rule that chose it."""

    index: int
    rule: str


def choose_prompts(
    differences: Sequence[tuple[str, Float64[np.ndarray, " prompts"]]], *, random: int, extreme: int, seed: int
) -> list[ChosenPrompt]:
    """Chooses prompts, each once: at random, then those with the largest differences of each sign.

    Equal differences are in the order of the prompts. A prompt whose difference is 0 is not an extreme.

    Args:
      differences: (description of the pair, each prompt's mean difference over all conditions).
    """
    prompts = len(differences[0][1])
    drawn = np.random.default_rng(seed).choice(prompts, size=min(random, prompts), replace=False)
    found = {int(index): f"drawn at random (seed {seed})" for index in np.sort(drawn)}
    for pair, difference_P in differences:
        for sign, word in ((1, "highest difference"), (-1, "lowest difference")):
            order = np.argsort(-sign * difference_P, kind="stable")[:extreme]
            for index in order[sign * difference_P[order] > 0]:
                found.setdefault(int(index), f"{pair}: {word} ({difference_P[index]:+.3g})")
    return [ChosenPrompt(index, rule) for index, rule in found.items()]
