"""Token rows and batches of preference pairs and labelled answers, for tests."""

from typing import NamedTuple

import numpy as np

from qlora_jax.data.batching.batches import fill_batch
from qlora_jax.data.batching.packing import Batch
from qlora_jax.data.branch_tree import Branch
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows

PAD = 0


class Pair(NamedTuple):
    """Ids of a prompt and two answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Labelled(NamedTuple):
    """Ids of a prompt and its answer, the answer of another row, and the label of the first."""

    prompt: list[int]
    completion: list[int]
    KL: list[int]
    label: bool


def random_ids(rng: np.random.Generator, longest: int, vocabulary: int) -> list[int]:
    return rng.integers(3, vocabulary, rng.integers(1, longest + 1)).tolist()


def random_pairs(count: int, *, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Pairs of very different lengths; the first prompt has one id, so it has no trunk."""
    rng = np.random.default_rng(seed)
    longest = (12, 9, 9)
    pairs = [Pair(*(random_ids(rng, most, vocabulary) for most in longest)) for _ in range(count)]
    return [pairs[0]._replace(prompt=pairs[0].prompt[:1]), *pairs[1:]]


def random_labelled(count: int, *, vocabulary: int, seed: int = 0) -> list[Labelled]:
    """Labelled answers; each prompt's other answer is that of the row before it."""
    pairs = random_pairs(count, vocabulary=vocabulary, seed=seed)
    return [
        Labelled(pair.prompt, pair.chosen, pairs[index - 1].chosen, index % 3 != 1) for index, pair in enumerate(pairs)
    ]


def tree(prompt: list[int], answers: list[list[int]], **values: list[float]) -> EncodedRow:
    """A row whose trunk is the prompt without its last id, with which each branch begins."""
    *trunk, last = prompt
    ids, supervised, branches = list(trunk), [False] * len(trunk), []
    for answer in answers:
        branches.append(Branch(len(ids), len(trunk)))
        ids += [last, *answer]
        supervised += [False, *[True] * len(answer)]
    arrays = {name: np.array(numbers, np.float32) for name, numbers in values.items()}
    flat = np.array(ids, np.int32), np.array(supervised)
    return EncodedRow(*flat, len(prompt), False, False, tuple(branches), arrays)


def pair_rows(pairs: list[Pair], reference: np.ndarray | None = None) -> TokenRows:
    """Rows of pairs, with log p of the reference [pairs, 2], 0 by default."""
    reference = np.zeros((len(pairs), 2)) if reference is None else reference
    rows = [tree(p.prompt, [p.chosen, p.rejected], reference=r.tolist()) for p, r in zip(pairs, reference, strict=True)]
    return _rows(rows)


def labelled_rows(labelled: list[Labelled], reference: np.ndarray | None = None, *, kl: bool = True) -> TokenRows:
    """Rows of labelled answers, each with another answer if `kl`, and log p of the reference [rows, 2]."""
    reference = np.zeros((len(labelled), 2)) if reference is None else reference
    return _rows(
        [
            tree(
                row.prompt,
                [row.completion, row.KL][: 1 + kl],
                reference=numbers[: 1 + kl].tolist(),
                labels=[float(row.label)] * (1 + kl),
            )
            for row, numbers in zip(labelled, reference, strict=True)
        ]
    )


def _rows(rows: list[EncodedRow]) -> TokenRows:
    return token_rows("rows.jsonl", rows, [Place(index + 1, index) for index in range(len(rows))])


def batch_of(rows: TokenRows, chosen: list[list[list[int]]], length: int, *, packed: bool, sequences: int) -> Batch:
    """The batch of the rows at indices [A, B, R]; -1 for a gap."""
    return fill_batch(rows, np.array(chosen), length, PAD, packed=packed, sequences=sequences)
