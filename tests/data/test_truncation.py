"""Rows that are too long: truncated, dropped or reported, and counted."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.branch_tree import branch_problem, longest_text
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.report.text import report_lines
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.data.truncation import FittedRows, LengthLimits, Overlong, fit_lengths
from tests.data.loading import load, rows_of_lengths
from tests.data.trees import Shape, encode_tree, shapes


def test_long_rows_are_cut_and_counted(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    report = load(plain_tokenizer, train=path, max_length=29).report.train
    # The row of 30 tokens loses its eos but not its answer. The row of 40 has no supervised token left.
    assert (report.rows, report.kept, report.truncated, report.overlong, report.unsupervised) == (4, 3, 1, 0, 1)
    assert report.percentiles == (10, 10, 20, 30, 40, 40) and report.cut == 0
    assert (report.tokens, report.supervised) == (9 + 19 + 28, 2 + 2 + 1)
    assert report.lost_ends == 1
    dropped = load(plain_tokenizer, train=path, max_length=29, overlong="drop").report.train
    assert (dropped.kept, dropped.truncated, dropped.overlong, dropped.unsupervised) == (2, 0, 2, 0)


def test_long_rows_can_lose_their_beginning_and_keep_bos(smollm2_source: dict, write_rows: Callable):
    asked = {**smollm2_source, "chat_template": None, "bos_token": "<|endoftext|>"}
    for adds_bos in (False, True):
        tokenizer = load_tokenizer({**asked, "add_bos_token": adds_bos})
        path = rows_of_lengths(tokenizer, write_rows)
        dataset = load(tokenizer, train=path, max_length=15, overlong="truncate-left")
        report = dataset.report.train
        assert (report.kept, report.truncated, report.unsupervised) == (4, 3, 0)
        whole = load(tokenizer, train=path).train
        for index in range(4):
            ids, supervised = dataset.train.row(index)
            all_ids, all_supervised = whole.row(index)
            tail = min(len(all_ids), 15) - adds_bos
            assert ids.tolist() == [0] * adds_bos + all_ids[-tail:].tolist()
            assert supervised.tolist() == [False] * adds_bos + all_supervised[-tail:].tolist()


def test_prompt_and_answer_can_have_lengths_of_their_own(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    dataset = load(plain_tokenizer, train=path, source_max_length=12, target_max_length=1)
    report = dataset.report.train
    assert (report.kept, report.truncated, report.tokens, report.supervised) == (4, 4, 8 + 3 * 12, 4)
    assert report.lost_ends == 4
    assert plain_tokenizer.decode(dataset.train.row(3)[0].tolist()) == " word" * 12 + " yes"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (dict(max_length=29), "1 truncated on the right (1 answer without the end), 1 dropped with no answer left"),
        (dict(max_length=30), "1 dropped with no answer left"),
        (dict(max_length=29, overlong="truncate-left"), "2 truncated on the left"),
        (dict(source_max_length=12), "3 truncated on the right"),
        (dict(source_max_length=28, max_length=29), "2 truncated on the right (2 answers without the end)"),
        (
            dict(max_length=29, overlong="truncate-left", target_max_length=1),
            "4 truncated on the left, and prompts or answers on the right (4 answers without the end)",
        ),
    ],
)
def test_the_report_names_the_side_and_the_answers_that_lost_their_end(
    plain_tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, settings: dict, line: str
):
    path, cache = rows_of_lengths(plain_tokenizer, write_rows), str(tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        report = load(plain_tokenizer, train=path, cache=cache, **settings).report
        limit = settings.get("max_length", "1,024")
        assert dict(report_lines(report))["too long"] == f"{line} (data.max_length {limit})"


def test_long_rows_can_be_errors(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    with pytest.raises(
        ValueError,
        match=r"2 of 4 rows.*\n.*:3, 4: found 30 to 40 tokens, expected at most 29 \(data\.max_length\).*\Z",
    ):
        load(plain_tokenizer, train=path, max_length=29, overlong="error")
    with pytest.raises(ValueError, match=r"1 of 4 rows(.|\n)*:4: found 40 tokens, expected at most 39"):
        load(plain_tokenizer, train=path, max_length=39, overlong="error")
    assert load(plain_tokenizer, train=path, max_length=40, overlong="error").report.train.kept == 4


def test_a_data_set_with_nothing_left_is_an_error(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = rows_of_lengths(plain_tokenizer, write_rows)
    with pytest.raises(
        ValueError,
        match=r"Of 4 rows, 4 were dropped because they are longer than data\.max_length 8(.|\n)*Raise data\.max",
    ):
        load(plain_tokenizer, train=path, max_length=8, overlong="drop")
    with pytest.raises(ValueError, match=r"Of 4 rows, 0 were dropped .* and 4 because their answers start after it"):
        load(plain_tokenizer, train=path, max_length=8)


# Trees whose texts all begin with the trunk's first id.
sft_trees = st.lists(
    shapes(st.integers(1, 4)).filter(lambda shape: all(depth for _, depth in shape.branches)), min_size=1, max_size=4
)


def texts_of(row: EncodedRow) -> list[list[int]]:
    """The trunk of a row, and the text that ends with each branch."""
    edges = [branch.begin for branch in row.branches] + [len(row.ids)]
    found = [row.ids[: edges[0]].tolist()]
    for branch, end in zip(row.branches, edges[1:], strict=True):
        found.append([*row.ids[: branch.depth].tolist(), *row.ids[branch.begin : end].tolist()])
    return found


def ends_lost(whole: EncodedRow, row: EncodedRow) -> int:
    """The number of runs of targets with their first id in the row, but not their last."""
    edges = [0, *(branch.begin for branch in whole.branches), len(whole.ids)]
    spans = [range(begin, end) for begin, end in itertools.pairwise(edges)]
    groups = [itertools.groupby(span, lambda at: bool(whole.supervised[at])) for span in spans]
    runs = [whole.ids[[*run]] for group in groups for learned, run in group if learned]
    return sum(run[0] in row.ids and run[-1] not in row.ids for run in runs)


def fitted(drawn: list[Shape], overlong: Overlong, limit: int) -> tuple[dict[int, EncodedRow], FittedRows]:
    """The rows of those shapes by the number of those kept, each with a bos in front."""
    rows = [encode_tree(shape, seed) for seed, shape in enumerate(drawn)]
    for row in rows:
        row.ids[0] = 1
    places = [Place(n + 1, n) for n in range(len(rows))]
    kept = fit_lengths(rows, places, LengthLimits(max_length=limit, overlong=overlong, bos_id=1))
    return dict(enumerate(rows)), kept


@given(sft_trees, st.integers(3, 30))
def test_texts_of_a_tree_lose_their_ends(drawn: list[Shape], limit: int):
    rows, kept = fitted(drawn, "truncate-right", limit)
    assert len(kept.rows) + kept.unsupervised == len(drawn) and not kept.overlong
    for row, place in zip(kept.rows, kept.places, strict=True):
        whole = rows[place.number]
        cut = [text[:limit] for text in texts_of(whole)]
        assert all(text in cut for text in texts_of(row)) and row.supervised[1:].any()
        assert branch_problem(row.branches, row.supervised) is None
        # Each target that is within the limit is kept, in its text.
        assert set(row.ids[row.supervised]) <= set(whole.ids[whole.supervised])
        edges = [branch.begin for branch in whole.branches] + [len(whole.ids)]
        for branch, end in zip(whole.branches, edges[1:], strict=True):
            inside = min(end, branch.begin + limit - branch.depth)
            targets = [at for at in range(branch.begin + 1, inside) if whole.supervised[at]]
            assert set(whole.ids[targets]) <= set(row.ids)
    pairs = zip(kept.rows, kept.places, strict=True)
    assert all(row.lost_ends == ends_lost(rows[place.number], row) for row, place in pairs)


@given(sft_trees, st.integers(3, 30))
def test_texts_of_a_tree_lose_their_beginnings_and_keep_bos(drawn: list[Shape], limit: int):
    rows, kept = fitted(drawn, "truncate-left", limit)
    for row, place in zip(kept.rows, kept.places, strict=True):
        assert not row.lost_ends
        whole = texts_of(rows[place.number])
        assert branch_problem(row.branches, row.supervised) is None and row.ids[0] == 1
        assert longest_text(len(row.ids), row.branches) <= limit
        for text in texts_of(row)[bool(row.branches) :]:
            assert any(text[1:] == one[len(one) - len(text) + 1 :] for one in whole)
        # Each id is learned once, and all that fit are learned if the trunk fits.
        learned, tails = row.ids[row.supervised].tolist(), [one[max(len(one) - limit + 1, 1) :] for one in whole]
        assert len({*learned}) == len(learned)
        if len(whole[0]) <= limit:
            first, *others = [{*tail} for tail in tails]
            targets = {*rows[place.number].ids[1:][rows[place.number].supervised[1:]].tolist()}
            assert {*learned} - {1} == targets & first.union(*(tail - {*whole[0]} for tail in others))


def test_a_long_branch_does_not_take_the_beginning_from_others():
    """A trunk of 6 ids, and texts of 4 + 6 and 2 + 3 ids. Only the first text is longer than 8."""
    rows, kept = fitted([Shape(6, ((6, 4), (3, 2)))], "truncate-left", 8)
    (row,), whole = kept.rows, texts_of(rows[0])
    assert texts_of(row) == [whole[0], [1, *whole[1][3:]], whole[2]] and kept.lost_branches == 0
    assert [branch.depth for branch in row.branches] == [0, 2]
    kept = fitted([Shape(12, ((6, 12), (3, 2)))], "truncate-left", 8)[1]
    assert (len(kept.rows[0].branches), kept.lost_branches, kept.truncated) == (1, 1, 1)


def test_trees_that_are_too_long_are_dropped_or_reported_by_their_longest_text():
    drawn = [Shape(6, ((4, 6), (9, 6))), Shape(6, ((4, 6), (4, 6)))]  # texts of up to 15 and 10 ids
    for limit, dropped in ((9, 2), (10, 1), (14, 1), (15, 0)):
        assert fitted(drawn, "drop", limit)[1].overlong == dropped
    (problem,) = fitted(drawn, "error", 10)[1].problems
    assert problem[1].startswith("found 15 tokens, expected at most 10 (data.max_length).")
