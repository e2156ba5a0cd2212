"""Training rows of sampled replies: the prompt is the trunk of a tree, and each reply a branch, with its sampled ids.

Dimension key: A micro-batches, B rows (prompts) of each, G replies to each prompt, T positions, S = G slots.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

from qlora_jax.data.batching.batches import fill_batch
from qlora_jax.data.batching.packing import NO_ROW, Batch
from qlora_jax.data.branch_tree import Branch, join_branches, lay_out
from qlora_jax.data.rows import TokenRows
from qlora_jax.objectives.policy_gradient import SAMPLER_LOGPS
from qlora_jax.rollouts.reply import Reply, Text


class Group(NamedTuple):
    """A prompt and the replies to it.

    Fields:
      number: of the prompt's row in the data.
      prompt: its ids.
      trained: True for each reply whose tokens are trained.
    """

    number: int
    prompt: Sequence[int]
    replies: Sequence[Reply]
    trained: Sequence[bool]

    @property
    def texts(self) -> list[Text]:
        """The texts of all replies."""
        return [text for reply in self.replies for text in reply.texts]

    def with_trained(self) -> Iterator[tuple[Reply, bool]]:
        """Yields each reply, and if its tokens are trained."""
        return zip(self.replies, self.trained, strict=True)


def replies_batch(
    groups: Sequence[Group | None],
    values: Mapping[str, Float[np.ndarray, "groups G"]],
    lengths: Sequence[int],
    shape: tuple[int, int],
    *,
    pad_id: int,
    position: dict[str, int] | None,
) -> Batch:
    """Returns the batch [A, B, T] of groups, in order; None is a gap.

    Args:
      values: numbers of each reply, for the batch's slots.
      lengths: padded lengths, ascending; the batch has the smallest that its rows fit.
      shape: (A, B).
      position: of the data, after these prompts.
    """
    filled = [index for index, group in enumerate(groups) if group is not None]
    kept = [group for group in groups if group is not None]
    rows = _token_rows(kept, {name: array[filled] for name, array in values.items()})
    chosen = np.full(len(groups), NO_ROW)
    chosen[filled] = np.arange(len(kept))
    chosen = chosen.reshape(*shape, 1)
    length = next(each for each in lengths if each >= rows.lengths.max())
    batch = fill_batch(rows, chosen, length, pad_id, sequences=len(kept[0].replies), position=position)
    logps, sequences = _by_position(rows, kept, chosen, length)
    return with_token_values(dataclasses.replace(batch, sequences=sequences), SAMPLER_LOGPS, logps)


def with_token_values(batch: Batch, name: str, values_ABT: Float[np.ndarray, "A B T"]) -> Batch:
    """Returns the batch with numbers for each of its targets."""
    return dataclasses.replace(batch, token_values={**batch.token_values, name: values_ABT})


def _token_rows(groups: Sequence[Group], values: Mapping[str, np.ndarray]) -> TokenRows:
    ids = [_flat(group, [text.ids for text in group.texts], group.prompt) for group in groups]
    drawn = [
        [
            text.drawn if trained else [False] * len(text.ids)
            for reply, trained in group.with_trained()
            for text in reply.texts
        ]
        for group in groups
    ]
    return TokenRows(
        ids=np.concatenate(ids).astype(np.int32),
        supervised=np.concatenate([_flat(group, own) for group, own in zip(groups, drawn, strict=True)]).astype(bool),
        starts=np.concatenate([[0], np.cumsum([len(each) for each in ids])]),
        numbers=np.array([group.number for group in groups], np.int64),
        lines=np.zeros(len(groups), np.int64),
        files=(),
        branches=join_branches([_branches(group) for group in groups]),
        values={name: array.astype(np.float32) for name, array in values.items()},
    )


def _branches(group: Group) -> list[Branch]:
    depth = len(group.prompt) - 1
    sizes = [1 + len(text.ids) for text in group.texts]
    return [Branch(depth + begin, depth) for begin in np.cumsum([0, *sizes[:-1]]).tolist()]


def _flat(group: Group, of_texts: Sequence[Sequence[float]], of_prompt: Sequence[int] | None = None) -> np.ndarray:
    """Returns the numbers of a row's ids: of the trunk, and of each branch, which begins with the prompt's last id."""
    prompt = np.zeros(len(group.prompt)) if of_prompt is None else np.asarray(of_prompt)
    return np.concatenate([prompt[:-1], *(part for own in of_texts for part in (prompt[-1:], own))])


def _by_position(
    rows: TokenRows, groups: Sequence[Group], chosen: np.ndarray, length: int
) -> tuple[Float[np.ndarray, "A B T"], Int32[np.ndarray, "A B T"]]:
    """Returns (log p of each target when it was drawn, the slot of each position, which the texts of a reply share)."""
    slots = len(groups[0].replies)
    found = np.zeros((*chosen.shape[:2], length), np.float32)
    sequences = np.full(found.shape, slots, np.int32)
    for (*place, _), index in np.ndenumerate(chosen):
        if index != NO_ROW:
            group, at = groups[index], int(index)
            logps = _flat(group, [text.logps for text in group.texts])
            ids = np.arange(len(logps), dtype=np.int32)  # in place of the ids: which one each position predicts
            row = lay_out(ids, rows.row(at)[1], rows.branches_of(at))
            slot_of = [slot for slot, reply in enumerate(group.replies) for _ in reply.texts]
            found[*place, : len(row.targets)] = logps[row.targets]
            sequences[*place, : len(row.targets)] = np.array([*slot_of, slots])[row.branches]  # -1: the trunk
    return found, sequences
