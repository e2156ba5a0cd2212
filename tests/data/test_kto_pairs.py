"""KL pairs: every completion once behind another prompt, in memory and in windows, and whatever the packing."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.kto_pairs import PairedRows, kl_shift, pair_rows, wrapped_ranges
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows
from tests.data.batching.test_mixture import stored

LIMIT = 12
sizes = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 11)).filter(lambda row: sum(row) <= LIMIT), min_size=2, max_size=12
)


def labelled_rows(sizes: list[tuple[int, int]]) -> TokenRows:
    """Rows with prompts and completions of those sizes. The ids of row n begin with n * 100, labels alternate."""
    encoded = [
        EncodedRow(
            100 * n + np.arange(prompt + completion, dtype=np.int32),
            np.arange(prompt + completion) >= prompt,
            prompt,
            False,
            False,
            values={"labels": [float(n % 2)]},
        )
        for n, (prompt, completion) in enumerate(sizes)
    ]
    return token_rows("rows.jsonl", encoded, [Place(n + 1, n) for n in range(len(sizes))])


def texts(rows: TokenRows, index: int) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of both texts of a row."""
    ids, supervised = rows.row(index)
    (first, second) = rows.branches_of(index)
    assert first.depth == second.depth == first.begin
    trunk, found = ids[: first.begin].tolist(), []
    for span in (slice(first.begin, second.begin), slice(second.begin, None)):
        found.append(([*trunk, *ids[span].tolist()], ids[span][supervised[span]].tolist()))
    assert not supervised[: first.begin].any()
    return found


@settings(max_examples=40)
@given(sizes, st.integers(0, 2**31))
def test_each_completion_is_behind_its_own_prompt_and_behind_one_other(drawn: list[tuple[int, int]], seed: int):
    rows = labelled_rows(drawn)
    paired = pair_rows(rows, kl_shift("rows.jsonl", len(rows), seed), LIMIT)
    others = []
    for index, (prompt, _) in enumerate(drawn):
        ids, _ = rows.row(index)
        (own, own_targets), (mixed, targets) = texts(paired, index)
        assert own == ids.tolist() and own_targets == ids[prompt:].tolist()
        assert mixed[:prompt] == ids[:prompt].tolist() and mixed[prompt:] == targets
        other = targets[0] // 100
        assert targets == rows.row(other)[0][drawn[other][0] :].tolist()[: LIMIT - prompt]
        assert other != index
        others.append(other)
        assert paired.values["labels"][index].tolist() == [index % 2] * 2
    assert sorted(others) == list(range(len(drawn)))


def test_the_seed_and_the_number_of_rows_choose_the_shift():
    shifts = [[kl_shift("rows.jsonl", 50, seed) for seed in range(20)] for _ in range(2)]
    assert shifts[0] == shifts[1] and len(set(shifts[0])) > 5
    assert {kl_shift("rows.jsonl", 3, seed) for seed in range(20)} == {1, 2}
    with pytest.raises(ValueError, match=r"rows\.jsonl: KTO's KL pairs .* \(found 1 row, expected at least 2\)"):
        kl_shift("rows.jsonl", 1, 0)
    with pytest.raises(ValueError, match=r"least 2 in each split of data\.eval_fraction 0\.1\)\. .*another fraction"):
        kl_shift("rows.jsonl", 1, 0, 0.1)


def test_stored_rows_are_paired_like_those_in_memory(tmp_path: Path):
    generator = np.random.default_rng(0)
    rows = labelled_rows([(int(a), LIMIT - int(a) - int(b)) for a, b in generator.integers(1, 6, (23, 2))])
    whole = pair_rows(rows, 7, LIMIT)
    paired = PairedRows(stored=stored(rows, tmp_path / "entry"), shift=7, max_length=LIMIT)
    assert paired.value_shapes == whole.value_shapes and paired.number_limit == whole.number_limit == 23
    for start, stop in ((0, 23), (0, 5), (14, 20), (19, 23)):
        part = paired.read(start, stop)
        np.testing.assert_array_equal(paired.lengths(start, stop), part.lengths)
        np.testing.assert_array_equal(paired.branch_counts(start, stop), part.branch_counts)
        for index in range(start, stop):
            assert texts(part, index - start) == texts(whole, index)
        assert part.values["labels"].tolist() == whole.values["labels"][start:stop].tolist()
    assert paired.line(22) == 23


def test_ranges_of_a_file_that_repeats():
    assert wrapped_ranges(3, 5, 4) == [(3, 4), (0, 1)]
    assert wrapped_ranges(4, 8, 4) == [(0, 4)]
    assert wrapped_ranges(2, 11, 4) == [(2, 4), (0, 4), (0, 3)]
