"""The kinds of rows are those of the objectives."""

from typing import get_args

import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs, ObjectiveName
from qlora_jax.data.row_kinds import ROW_USES, TEXT_NAMES, objectives_of
from qlora_jax.training.objectives.make_objective import make_objective


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_every_objective_trains_on_the_rows_that_are_made_for_it(objective: ObjectiveName):
    config = Config(model=ModelArgs(path="model"), data=DataArgs(train="rows.jsonl"), output="run", objective=objective)
    made, use = make_objective(config), ROW_USES[objective]
    assert made.row_kind == use.kind
    assert set(made.values) - {"reference"} == {"none": set(), "margin": {"margins"}}.get(use.values, {"labels"})


def test_kinds_have_names_of_texts_and_objectives():
    assert set(ROW_USES) == set(get_args(ObjectiveName))
    assert all(objectives_of(kind) for kind in TEXT_NAMES)
