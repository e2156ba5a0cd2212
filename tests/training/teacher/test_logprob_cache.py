"""Predictions in files: those of a teacher that is asked, in any packing, once per row, and never damaged ones."""

from pathlib import Path

import numpy as np
import pytest

from qlora_jax.data.batching.batches import eval_batches, fill_batch
from qlora_jax.data.batching.packing import Batch
from qlora_jax.data.rows import TokenRows
from qlora_jax.training.teacher.logprob_cache import Arrays, LiveTeacher, Predictions, StoredTeacher
from tests.training.preference_rows import pair_rows, random_pairs

COUNT, LENGTH = 3, 64
PACKED = [[[2, 0]], [[1, 3]]]


class AskedTeacher:
    """A teacher whose predictions name the tokens that they are for."""

    def __init__(self):
        self.batches = 0

    def predict(self, arrays: Arrays) -> Predictions:
        self.batches += 1
        numbers = 50 * arrays["inputs"] + arrays["targets"]
        ids = numbers[..., None] + np.arange(COUNT, dtype=np.int32)
        return Predictions(ids.astype(np.int32), -numbers[..., None] - np.arange(COUNT + 1, dtype=np.float32))


def tree_rows() -> TokenRows:
    return pair_rows(random_pairs(4, vocabulary=50))


def batches_once(rows: TokenRows) -> list[Batch]:
    return [*eval_batches(rows, (LENGTH,), batch_size=3, pad_id=0)]


def packed_batch(rows: TokenRows) -> Batch:
    return fill_batch(rows, np.array(PACKED), LENGTH, 0, packed=True)


def filled(folder: Path, key: str = "key") -> tuple[StoredTeacher, AskedTeacher]:
    stored, teacher = StoredTeacher(folder=folder, key=key, count=COUNT), AskedTeacher()
    stored.fill(batches_once(tree_rows()), lambda: teacher, lambda done: None)
    return stored, teacher


def test_packs_of_trees_get_what_the_teacher_says_of_them(tmp_path: Path):
    stored, teacher = filled(tmp_path)
    assert teacher.batches == 2 and len([*tmp_path.iterdir()]) == 4
    batch = packed_batch(tree_rows())
    found, live = (each.attach(batch).token_values for each in (stored, LiveTeacher(AskedTeacher())))
    is_supervised = batch.weights > 0
    assert is_supervised.sum() > 20
    for name, values in live.items():
        np.testing.assert_array_equal(found[name][is_supervised], values[is_supervised])
        np.testing.assert_array_equal(found[name][~is_supervised], 0)


def test_only_missing_and_damaged_rows_are_computed(tmp_path: Path):
    filled(tmp_path)
    assert filled(tmp_path)[1].batches == 0
    assert filled(tmp_path, key="another teacher")[1].batches == 2
    victim = sorted(tmp_path.iterdir())[0]
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match="damaged"):
        again = filled(tmp_path)[1].batches + filled(tmp_path, key="another teacher")[1].batches
    assert again == 1 and victim.read_bytes() == content


def test_a_row_without_predictions_raises_an_error(tmp_path: Path):
    stored, _ = filled(tmp_path)
    sorted(tmp_path.iterdir())[0].unlink()
    with pytest.raises(ValueError, match=r"missing or damaged\. Resume the run"):
        stored.attach(packed_batch(tree_rows()))
