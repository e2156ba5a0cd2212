"""The arrays of abstract batches are those of real ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs
from qlora_jax.config.objectives import ObjectiveName, objectives_with
from qlora_jax.data.dataset import load_dataset
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.objective import needs_reference
from qlora_jax.training.step_spec import abstract_batch
from tests.inference.tiny import byte_tokenizer
from tests.training.preference_rows import batch_of, labelled_rows, pair_rows, random_labelled, random_pairs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", objectives_with("preference"))
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


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", objectives_with("preference"))
def test_abstract_batches_have_all_that_a_run_has(name: ObjectiveName, packing: bool, tmp_path: Path):
    rows = [{"prompt": f"p{n}", "completion": "yes", "label": n % 2 == 0} for n in range(8)]
    if name != "kto":
        rows = [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no no"} for n in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArgs(train=str(path), max_length=32, packing=packing)
    objective = make_objective(Config(model=ModelArgs(path="m"), data=data, output="o", objective=name))
    settings = {"objective": name, "kl_pairs": objective.kl_pairs, "seed": 0}
    dataset = load_dataset(data, byte_tokenizer(), micro_batch_size=2, accumulation=1, **settings)
    if needs_reference(objective):
        values = np.zeros((dataset.train.number_limit, dataset.sequences), np.float32)
        dataset = dataset.with_values("reference", values)
    batch = next(dataset.train_batches())
    expected = abstract_batch(batch.inputs.shape, objective, packed=dataset.packed, branching=dataset.branching)
    assert {name: (each.shape, each.dtype) for name, each in expected.items()} == {
        name: (array.shape, array.dtype) for name, array in batch.arrays().items()
    }
