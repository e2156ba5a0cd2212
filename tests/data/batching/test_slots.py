"""Slots: enough for any pack, and values in the slots of their rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.batching.packing import pack, packed_lengths, slot_count, slot_values


@given(st.lists(st.integers(1, 12), min_size=20, max_size=60), st.integers(1, 4))
def test_a_pack_has_a_slot_for_each_sequence(drawn: list[int], sequences: int):
    lengths = np.maximum(np.array(drawn), sequences)  # a sequence has at least one position
    packs = pack(packed_lengths(lengths, sequences), 64, np.arange(len(lengths)))
    assert max(len(rows) for rows in packs) * sequences <= slot_count(64, packed=True, sequences=sequences)
    assert slot_count(64, packed=True, sequences=sequences) % sequences == 0  # rows have all of their slots
    assert sorted(index for rows in packs for index in rows) == list(range(len(lengths)))


def test_a_row_alone_has_as_many_slots_as_sequences():
    assert [slot_count(length, packed=False, sequences=2) for length in (64, 128)] == [2, 2]


def test_values_are_in_the_slots_of_their_rows_and_gaps_have_none():
    values = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    chosen = np.array([[[2, 0], [1, -1]]])
    filled = slot_values(values, chosen, 6)
    assert filled.shape == (1, 2, 6, 2)
    assert filled[0, :, :, 0].tolist() == [[8, 10, 0, 2, 0, 0], [4, 6, 0, 0, 0, 0]]
