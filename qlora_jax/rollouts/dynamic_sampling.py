"""Draws replies again to prompts whose replies have equal rewards and so teach nothing (DAPO's dynamic sampling).

DAPO replaces such prompts by others. Here they keep their place in the data, so a run that resumes needs only its step.

Dimension key: P prompts of a phase, G replies to each, N = P G replies, F reward functions.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from qlora_jax.rewards.functions import RewardTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw[Replies]:
    """Replies to prompts.

    Attributes:
      groups: the replies to each prompt.
      table: rewards of all replies.
      sampling, scoring: seconds.
      tokens: number of sampled tokens.
    """

    groups: list[Replies]
    table: RewardTable
    sampling: float
    scoring: float
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Redrawn[Replies]:
    """The replies to train on.

    Attributes:
      draw: the replies that count, with the failures, seconds and tokens of all draws.
      first_NF: rewards of the first draws, which say how good the model is; those of `draw` are selected.
      draws_P: number of draws for each prompt.
    """

    draw: Draw[Replies]
    first_NF: Float64[np.ndarray, "N F"]
    draws_P: Int64[np.ndarray, " P"]


def draw_with_signal[Replies](
    draw: Callable[[Sequence[int], int], Draw[Replies]],
    prompts: int,
    most: int,
    has_signal: Callable[[Float64[np.ndarray, "N F"]], Bool[np.ndarray, " P"]],
) -> Redrawn[Replies]:
    """Draws replies, and up to `most` times again to prompts without signal, which keep the first replies if none has.

    Args:
      draw: returns the replies to the prompts with these numbers; it also gets the number of the draw, from 0 on.
      has_signal: returns which prompts' replies have different rewards.
    """
    found = draw(range(prompts), 0)
    first_NF, draws_P = found.table.rewards_NF.copy(), np.ones(prompts, np.int64)
    for number in range(1, most + 1):
        left = np.flatnonzero(~has_signal(found.table.rewards_NF))
        if not left.size:
            break
        again = draw(left.tolist(), number)
        draws_P[left] += 1
        found = _replaced(found, again, left, has_signal(again.table.rewards_NF))
    return Redrawn(draw=found, first_NF=first_NF, draws_P=draws_P)


def _replaced[Replies](
    found: Draw[Replies], again: Draw[Replies], left: Int64[np.ndarray, " left"], better: Bool[np.ndarray, " left"]
) -> Draw[Replies]:
    """Returns the draw with the better ones of the groups `left`."""
    groups, prompts = list(found.groups), len(found.groups)
    rewards_PGF = found.table.rewards_NF.reshape(prompts, -1, len(found.table.names)).copy()
    rewards_PGF[left[better]] = again.table.rewards_NF.reshape(len(left), *rewards_PGF.shape[1:])[better]
    for at in np.flatnonzero(better):
        groups[left[at]] = again.groups[at]
    replies = rewards_PGF.shape[1]
    problems = [
        each._replace(row=int(left[each.row // replies]) * replies + each.row % replies)
        for each in again.table.problems
    ]
    table = found.table._replace(
        rewards_NF=rewards_PGF.reshape(found.table.rewards_NF.shape), problems=[*found.table.problems, *problems]
    )
    sums = {name: getattr(found, name) + getattr(again, name) for name in ("sampling", "scoring", "tokens")}
    return Draw(groups=groups, table=table, **sums)
