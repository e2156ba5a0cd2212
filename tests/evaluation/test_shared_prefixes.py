"""Rows that share a prompt are packed into rows of bounded length."""

import numpy as np

from qlora_jax.evaluation.shared_prefixes import pack_rows
from tests.evaluation.reference import options
from tests.inference.tiny import VOCAB


def test_many_continuations_are_several_rows():
    rng = np.random.default_rng(9)
    rows = options(rng, rng.integers(0, VOCAB, 100).astype(np.int32), [60] * 20)
    packed = pack_rows(rows, share=True)
    assert [len(one.ids) for one in packed] == [100 + 59 * 8, 100 + 59 * 9, 100 + 59 * 3]
    assert sorted({int(index) for one in packed for index in one.row}) == [*range(20)]
    assert len(pack_rows(rows, share=False)) == 20
