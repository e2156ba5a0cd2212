"""Preference pairs of sampled replies: the best and the worst reply to a prompt, by their rewards.

A reply that was cut is in no pair. As chosen, it would teach to stop in the middle; as rejected, the end that training
puts after it would become less likely, though the model never drew it.

Dimension key: G replies to a prompt.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from qlora_jax.rollouts.advantages import NO_SPREAD
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.reply import Reply

ADDED = ("prompt", "chosen", "rejected", "margin")  # columns of a row of pairs
LeftOut = Literal[
    "fewer than two replies that ended", "fewer than two replies with a reward", "equal rewards", "equal replies"
]


class Pair(NamedTuple):
    """Numbers of two replies to a prompt, and the difference of their rewards."""

    chosen: int
    rejected: int
    margin: float


def choose_pair(replies: Sequence[Reply], rewards_G: Float64[np.ndarray, " G"]) -> Pair | LeftOut:
    """Returns the pair with the largest margin, the first of several; or why there is none.

    Replies that were cut or are blank, and those without a reward (nan), are in no pair.
    """
    ended = [number for number, reply in enumerate(replies) if not reply.is_cut and reply.text.strip()]
    scored = [number for number in ended if np.isfinite(rewards_G[number])]
    if len(scored) < 2:
        return "fewer than two replies that ended" if len(ended) < 2 else "fewer than two replies with a reward"
    ordered = [Pair(a, b, float(rewards_G[a] - rewards_G[b])) for a, b in itertools.permutations(scored, 2)]
    better = [pair for pair in ordered if pair.margin > NO_SPREAD]
    different = [pair for pair in better if replies[pair.chosen].text != replies[pair.rejected].text]
    if not different:
        return "equal replies" if better else "equal rewards"
    return max(different, key=lambda pair: pair.margin)


def preference_row(prompts: PromptRows, number: int, replies: Sequence[Reply], pair: Pair) -> dict[str, object]:
    """Returns a row of the format `preference`: texts for a prompt of text, else messages; other columns are kept."""
    prompt, texts = prompts.prompt(number), (replies[pair.chosen].text, replies[pair.rejected].text)
    answers = texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
    return dict(zip(ADDED, (prompt, *answers, pair.margin), strict=True)) | prompts.others(number)
