"""The arrays of abstract batches are those of real ones."""

import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs
from qlora_jax.config.preference_settings import PREFERENCES, ObjectiveName
from qlora_jax.training.abstract_step import abstract_batch
from qlora_jax.training.objectives.make_objective import make_objective
from tests.training.preference_rows import batch_of, labelled_rows, pair_rows, random_labelled, random_pairs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PREFERENCES)
def test_abstract_batches_are_those_of_rows(name: ObjectiveName, packed: bool):
    objective = make_objective(Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", objective=name))
    sequences = objective.sequences_per_row
    labelled = random_labelled(4, vocabulary=32)
    rows = labelled_rows(labelled) if name == "kto" else pair_rows(random_pairs(4, vocabulary=32))
    chosen = [[[0, 1], [2, 3]]] if packed else [[[0], [1], [2], [3]]]
    arrays = batch_of(rows, chosen, 64, packed=packed, sequences=sequences).arrays()
    reads = {"present", *objective.values}
    found = {name: array for name, array in arrays.items() if name in reads or array.shape[2] == 64}
    shape = (1, len(chosen[0]), 64)
    expected = abstract_batch(shape, objective, packed=packed, branching=True)
    assert {name: (each.shape, each.dtype) for name, each in expected.items()} == {
        name: (array.shape, np.dtype(array.dtype)) for name, array in found.items()
    }
