"""The kinds of rows are those of the objectives."""

import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.data.row_kinds import TEXT_NAMES, objectives_of, row_use
from qlora_jax.objectives.make_objective import make_objective


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_every_objective_trains_on_the_rows_that_are_made_for_it(objective: str):
    config = Config(model=ModelArgs(path="model"), data=DataArgs(train="rows.jsonl"), output="run", objective=objective)
    made, use = make_objective(config), row_use(objective)
    assert made.row_kind == use.kind
    assert set(made.values) - {"reference", "advantages", "token_scale"} == {"none": set(), "margin": {"margins"}}.get(
        use.values, {"labels"}
    )


def test_kinds_have_names_of_texts_and_objectives():
    assert all(objectives_of(kind) for kind in TEXT_NAMES)
