"""Token rows and batches of prompts with sampled replies, for tests.

Dimension key: P prompts, G replies to each, A micro-batches, B rows, S slots, T positions.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows
from tests.training.preference_rows import batch_of, random_ids, tree

EOS = 2
Replies = list[list[list[int]]]


def random_replies(prompts: int, replies: int, *, vocabulary: int, seed: int = 0) -> tuple[list[list[int]], Replies]:
    """Draws prompts and replies of very different lengths; about two thirds of the replies end with EOS."""
    rng = np.random.default_rng(seed)
    drawn = [[random_ids(rng, 9, vocabulary) for _ in range(replies)] for _ in range(prompts)]
    ended = [
        [[*reply, EOS] if (row + at) % 3 else reply for at, reply in enumerate(group)]
        for row, group in enumerate(drawn)
    ]
    return [random_ids(rng, 7, vocabulary) for _ in range(prompts)], ended


def policy_arrays(
    prompts: list[list[int]],
    replies: Replies,
    chosen: Sequence[Sequence[Sequence[int]]],
    *,
    advantages: np.ndarray,
    token_scale: np.ndarray,
    trained: np.ndarray,
    of_tokens: Mapping[str, Sequence[Sequence[Sequence[float]]]],
    length: int = 64,
    packed: bool = False,
) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch of the prompts at indices [A, B, R]; -1 for a gap.

    Args:
      advantages, token_scale, trained: of each reply [P, G]; False in `trained` masks a reply.
      of_tokens: arrays per token, by name: a number for each token of each reply.
    """
    rows = _rows(prompts, replies, advantages, token_scale, trained)
    generations = len(replies[0])
    arrays = batch_of(
        rows, [[[*row] for row in micro] for micro in chosen], length, packed=packed, sequences=generations
    ).arrays()
    for name, values in of_tokens.items():
        arrays[name] = np.zeros(arrays["inputs"].shape, np.float32)
        for place in np.argwhere(np.array(chosen) >= 0):
            micro, row, at = place.tolist()
            for sample, numbers in enumerate(values[chosen[micro][row][at]]):
                slot = at * generations + sample
                arrays[name][micro, row, arrays["sequences"][micro, row] == slot] = numbers
    return arrays


def _rows(
    prompts: list[list[int]], replies: Replies, advantages: np.ndarray, token_scale: np.ndarray, trained: np.ndarray
) -> TokenRows:
    rows = []
    for prompt, group, own, scale, is_trained in zip(prompts, replies, advantages, token_scale, trained, strict=True):
        row = tree(prompt, group, advantages=own.tolist(), token_scale=scale.tolist())
        ends = [*(branch.begin for branch in row.branches[1:]), len(row.ids)]
        for branch, end, keep in zip(row.branches, ends, is_trained, strict=True):
            row.supervised[branch.begin : end] &= bool(keep)
        rows.append(row)
    return token_rows("prompts.jsonl", rows, [Place(index + 1, index) for index in range(len(rows))])
