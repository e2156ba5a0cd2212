"""Drops or truncates rows of several texts, or with a label, that are too long, and counts them.

data.max_length limits each text: a prompt with its answer. truncate-right cuts the ends of answers. truncate-left cuts
the beginning of the prompt, for all answers alike; only answers that do not fit after the prompt's last token lose
their ends. Of texts without a prompt, it cuts the beginning.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from qlora_jax.data.branch_tree import MIN_BRANCH, Branch, branch_ends, longest_text
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place, Problem
from qlora_jax.data.row_kinds import RowUse
from qlora_jax.data.truncation import FittedRows, LengthLimits

_Marked = tuple[Int32[np.ndarray, " _"], Bool[np.ndarray, " _"]]  # ids, and True for those that are supervised


def fit_branches(
    rows: Sequence[EncodedRow], places: Sequence[Place], limits: LengthLimits, use: RowUse
) -> tuple[FittedRows, int]:
    """Returns rows whose texts have at most `max_length` ids, and the number of pairs that became equal.

    The other rows are truncated, dropped or reported as problems. A truncated row is dropped if an answer has nothing
    left, or if its two answers are equal then.
    """
    kept: list[EncodedRow] = []
    kept_places: list[Place] = []
    problems: list[Problem] = []
    truncated = overlong = emptied = equal = 0
    for row, place in zip(rows, places, strict=True):
        longest = longest_text(len(row.ids), row.branches)
        if longest > limits.max_length:
            cuts_prompt = use.kind == "prompt" and limits.overlong == "truncate-right"  # the question itself
            if cuts_prompt or not limits.overlong.startswith("truncate"):
                overlong += limits.overlong == "drop"
                problems += [(place, _too_long(longest, limits, use))] if limits.overlong != "drop" else []
                continue
            cut = truncate_texts(row, limits, use)
            if cut is None or (use.kind == "pair" and has_equal_texts(cut)):
                emptied, equal = emptied + (cut is None), equal + (cut is not None)
                continue
            row, truncated = cut, truncated + 1
        kept.append(row)
        kept_places.append(place)
    fitted = FittedRows(kept, kept_places, truncated, overlong, emptied, problems)
    return fitted, equal


def _too_long(longest: int, limits: LengthLimits, use: RowUse) -> str:
    if use.kind == "prompt":
        return (
            f"found {longest - 1} tokens in the prompt, expected at most {limits.max_length - 1} (data.max_length less "
            "rollouts.max_completion_length). Raise data.max_length, or set data.overlong to drop or truncate-left"
        )
    return (
        f"found {longest} tokens in one text, expected at most {limits.max_length} (data.max_length). Raise it, or set "
        "data.overlong to drop or truncate-right."
    )


def truncate_texts(row: EncodedRow, limits: LengthLimits, use: RowUse) -> EncodedRow | None:
    """Returns the row with each text of at most `max_length` ids; None if a text has no target left."""
    trunk, texts = _split(row, use)
    if limits.overlong == "truncate-left":
        trunk, texts = _cut_left(trunk, texts, limits)
    room = limits.max_length - len(trunk[0])
    lost = sum(len(ids) > room for ids, _ in texts)
    texts = [_cut_right(text, room, use.head) for text in texts]
    # A pair's branch begins with the last id of the prompt, and a head needs a filler after the answer.
    least = MIN_BRANCH + (use.head and use.kind == "pair")
    if any(len(ids) < least or not mask[1:].any() for ids, mask in texts):
        return None
    return _joined(row, trunk, texts)._replace(lost_ends=lost)


def has_equal_texts(row: EncodedRow) -> bool:
    """Returns True if the row's branches have the same ids."""
    begins, ends = [branch.begin for branch in row.branches], branch_ends(row.branches, len(row.ids))
    first, *others = (row.ids[begin:end] for begin, end in zip(begins, ends, strict=True))
    return all(np.array_equal(first, other) for other in others)


def _split(row: EncodedRow, use: RowUse) -> tuple[_Marked, list[_Marked]]:
    """Returns the row's trunk and its branches. A row of one text has its prompt, without its last id, as its trunk."""
    one = Branch(max(row.source - 1, 0) if use.kind == "labelled" else 0, 0)
    branches = row.branches or (one,)
    spans = [(0, branches[0].begin)]
    spans += zip([branch.begin for branch in branches], branch_ends(branches, len(row.ids)), strict=True)
    trunk, *texts = [(row.ids[begin:end], row.supervised[begin:end]) for begin, end in spans]
    return trunk, texts


def _cut_left(trunk: _Marked, texts: list[_Marked], limits: LengthLimits) -> tuple[_Marked, list[_Marked]]:
    if not len(trunk[0]):
        return trunk, [_without_first(text, len(text[0]) - limits.max_length, limits) for text in texts]
    longest = max(len(ids) for ids, _ in texts)
    return _without_first(trunk, len(trunk[0]) + longest - limits.max_length, limits), texts


def _without_first(text: _Marked, count: int, limits: LengthLimits) -> _Marked:
    """Returns the text without its first `count` ids, or as many as it has; a bos at its beginning stays."""
    if count <= 0:
        return text
    first = int(text[0][0] == limits.bos_id)
    kept = np.r_[:first, min(first + count, len(text[0])) : len(text[0])]
    return text[0][kept], text[1][kept]


def _cut_right(text: _Marked, room: int, filler: bool) -> _Marked:
    """Returns the first `room` ids of a text, the last of which is its filler if it has one."""
    if len(text[0]) <= room:
        return text
    last = int(filler)
    kept = np.r_[: max(room - last, 0), len(text[0]) - last : len(text[0])]
    return text[0][kept], text[1][kept]


def _joined(row: EncodedRow, trunk: _Marked, texts: Sequence[_Marked]) -> EncodedRow:
    ids, supervised = (np.concatenate([trunk[part], *(text[part] for text in texts)]) for part in (0, 1))
    begins = len(trunk[0]) + np.cumsum([0, *(len(ids) for ids, _ in texts[:-1])])
    has_prompt = row.source < len(row.ids)
    return row._replace(
        ids=ids,
        supervised=supervised,
        source=len(trunk[0]) + 1 if has_prompt else len(ids),
        branches=tuple(Branch(begin, len(trunk[0])) for begin in begins.tolist()) if row.branches else (),
    )
