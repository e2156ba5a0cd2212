"""Rows of several texts that are too long: each text is cut as if it stood alone."""

from typing import Any

import numpy as np
import pytest

from qlora_jax.data.branch_tree import Branch
from qlora_jax.data.branches.truncation import fit_branches
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.row_kinds import row_use
from qlora_jax.data.truncation import LengthLimits

BOS, FILLER = 1, 0


def pair(prompt: list[int], *answers: list[int], head: bool = False, branches: bool = True) -> EncodedRow:
    """A row as the encoder makes it: the last id of the prompt begins each branch."""
    depth, filler = max(len(prompt) - 1, 0), [FILLER] if head else []
    ids, supervised, begins = prompt[:depth], [False] * depth, []
    for answer in answers:
        begins.append(len(ids))
        ids = [*ids, *prompt[depth:], *answer, *filler]
        supervised += [False] * (len(ids) - len(supervised))
        for at in range(len(ids) - 1 if head else begins[-1] + 1, len(ids)):
            supervised[at] = True
    tree = tuple(Branch(begin, depth) for begin in begins) if branches else ()
    return EncodedRow(np.array(ids, np.int32), np.array(supervised), len(prompt) or len(ids), False, False, tree)


def fitted(row: EncodedRow, objective: str, max_length: int, overlong: Any) -> tuple[EncodedRow | None, dict[str, int]]:
    """The row, or None if it is dropped, and the counts that are not zero."""
    limits = LengthLimits(max_length=max_length, overlong=overlong, bos_id=BOS)
    found, equal = fit_branches([row], [Place(3, 2)], limits, row_use(objective))
    counts = {"truncated": found.truncated, "overlong": found.overlong, "empty": found.unsupervised, "equal": equal}
    counts["ends"] = sum(row.lost_ends for row in found.rows)
    assert [place for place in found.places] == [Place(3, 2)] * len(found.rows)
    return next(iter(found.rows), None), {name: count for name, count in counts.items() if count}


def assert_equal(a: EncodedRow | None, b: EncodedRow) -> None:
    assert a is not None
    assert (a.ids.tolist(), a.supervised.tolist()) == (b.ids.tolist(), b.supervised.tolist())
    assert (a.branches, a.source) == (b.branches, b.source)


PROMPT, LONG, SHORT = [BOS, 11, 12, 13], [21, 22, 23, 24], [31, 32]


@pytest.mark.parametrize(
    ("overlong", "max_length", "expected", "ends"),
    [
        ("truncate-right", 8, pair(PROMPT, LONG, SHORT), 0),
        ("truncate-right", 6, pair(PROMPT, LONG[:2], SHORT), 1),
        ("truncate-right", 5, pair(PROMPT, LONG[:1], SHORT[:1]), 2),
        ("truncate-left", 7, pair([BOS, 12, 13], LONG, SHORT), 0),
        ("truncate-left", 6, pair([BOS, 13], LONG, SHORT), 0),
        ("truncate-left", 5, pair([BOS, 13], LONG[:3], SHORT), 1),
        ("truncate-left", 3, pair([BOS, 13], LONG[:1], SHORT[:1]), 2),
    ],
)
def test_pairs(overlong: str, max_length: int, expected: EncodedRow, ends: int):
    found, counts = fitted(pair(PROMPT, LONG, SHORT), "dpo", max_length, overlong)
    assert_equal(found, expected)
    assert counts == {name: count for name, count in {"truncated": int(max_length < 8), "ends": ends}.items() if count}


def test_the_longer_answer_decides_how_much_of_the_prompt_is_cut():
    assert_equal(fitted(pair(PROMPT, SHORT, LONG), "dpo", 6, "truncate-left")[0], pair([BOS, 13], SHORT, LONG))


@pytest.mark.parametrize("max_length", [2, 3, 4])
def test_a_prompt_at_the_limit_leaves_no_answer(max_length: int):
    assert fitted(pair(PROMPT, LONG, SHORT), "dpo", max_length, "truncate-right") == (None, {"empty": 1})
    assert fitted(pair(PROMPT, LONG, branches=False), "kto", max_length, "truncate-right") == (None, {"empty": 1})
    row = pair(PROMPT, LONG, SHORT, head=True)  # its filler needs a place too
    assert fitted(row, "reward", max_length + 1, "truncate-right") == (None, {"empty": 1})


def test_answers_that_truncation_makes_equal_are_dropped():
    row = pair(PROMPT, [*SHORT, 40], [*SHORT, 50])
    assert fitted(row, "dpo", 6, "truncate-right") == (None, {"equal": 1})
    assert fitted(row, "dpo", 7, "truncate-right")[1] == {}


def test_fillers_stay_at_the_ends():
    found, counts = fitted(pair(PROMPT, LONG, SHORT, head=True), "reward", 7, "truncate-right")
    assert_equal(found, pair(PROMPT, LONG[:2], SHORT, head=True))
    assert counts == {"truncated": 1, "ends": 1}
    text = [BOS, *range(11, 20)]
    for overlong, kept in (("truncate-right", text[:5]), ("truncate-left", [BOS, *text[-4:]])):
        found, counts = fitted(pair([], text, head=True, branches=False), "classification", 6, overlong)
        assert_equal(found, pair([], kept, head=True, branches=False))
        assert counts.get("ends", 0) == (overlong == "truncate-right")
    found, _ = fitted(pair([], text, text[:3], text[:8], head=True), "embedding", 6, "truncate-left")
    assert_equal(found, pair([], [BOS, *text[-4:]], text[:3], [BOS, *text[4:8]], head=True))


def test_labelled_answers_are_cut_like_pairs():
    row = pair(PROMPT, LONG, branches=False)
    assert_equal(fitted(row, "kto", 6, "truncate-right")[0], pair(PROMPT, LONG[:2], branches=False))
    assert_equal(fitted(row, "kto", 6, "truncate-left")[0], pair([BOS, 13], LONG, branches=False))


def test_longer_rows_are_errors_or_dropped():
    assert fitted(pair(PROMPT, LONG, SHORT), "dpo", 7, "drop") == (None, {"overlong": 1})
    limits = LengthLimits(max_length=7, overlong="error")
    rows, places = [pair(PROMPT, LONG, SHORT), pair(PROMPT, SHORT, LONG[:3])], [Place(1, 0), Place(2, 1)]
    found, _ = fit_branches(rows, places, limits, row_use("dpo"))
    assert [place for place, _ in found.problems] == [Place(1, 0)] and len(found.rows) == 1
    assert found.problems[0][1].startswith("found 8 tokens in one text, expected at most 7 (data.max_length).")
