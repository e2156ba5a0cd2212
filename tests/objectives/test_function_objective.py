"""A loss function is an objective: cross-entropy as a function is sft to the bit, and its sums are over the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.config import Config, DataArgs, ModelArgs
from qlora_jax.config.objectives import OBJECTIVES, ObjectiveDeclaration
from qlora_jax.nn.lm_head.cross_entropy import token_nll
from qlora_jax.objectives.function_objective import FunctionObjective, loss_declaration
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.sft import SUPERVISED
from qlora_jax.training.step import gradients
from tests.training.mesh_models import WHOLE_VOCABULARY, mesh_batch, mesh_config, mesh_parts

CONFIG = mesh_config(WHOLE_VOCABULARY)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OBJECTIVES, "_values", dict(OBJECTIVES.items()))


def cross_entropy(model, hidden_MD, micro):
    targets_BT, weights_BT = micro["targets"], micro["weights"]
    with jax.named_scope("head"):
        nll_M = token_nll(hidden_MD, model.head, targets_BT.reshape(-1), weights_BT.reshape(-1) > 0)
    return jnp.sum(nll_M.reshape(weights_BT.shape) * weights_BT, axis=1)


def config(objective: str, **data) -> Config:
    return Config(model=ModelArgs(path="m"), data=DataArgs(train="t", **data), output="o", objective=objective)


def step(objective):
    parts, batch = mesh_parts(CONFIG), mesh_batch(CONFIG, (2, 3, 32))
    return gradients(parts, batch, None, remat="names", objective=objective)


def test_cross_entropy_as_a_function_is_sft_to_the_bit():
    q.register_objective("own", cross_entropy)
    ours, theirs = step(make_objective(config("own"))), step(SUPERVISED)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))


def test_a_mean_over_rows_counts_rows_with_supervised_tokens():
    objective = FunctionObjective(function=cross_entropy, per="rows")
    weights = jnp.asarray([[[1.0, 1, 0], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]])
    assert objective.count({"weights": weights}) == 3
    assert SUPERVISED.count({"weights": weights}) == 6
    q.register_objective("rows", cross_entropy, per="rows")
    with pytest.raises(ValueError, match=r"data\.packing: found true with objective=rows, whose loss is a mean over"):
        make_objective(config("rows", packing=True))


def test_what_is_not_an_objective_is_one_error():
    q.register_objective("wrong", lambda model, hidden_MD, micro: jnp.zeros((7,)))
    with pytest.raises(ValueError, match=r"returned an array of shape \(7,\) \(expected one loss per row, \(3,\)\)"):
        step(make_objective(config("wrong")))
    q.register_objective("none", ObjectiveDeclaration(implementation=lambda config: None, rows="text"))
    with pytest.raises(ValueError, match="'none' is declared with a function that returns NoneType, which is not an"):
        make_objective(config("none"))
    q.register_objective("missing", ObjectiveDeclaration(implementation="nowhere:make", rows="text"))
    with pytest.raises(ValueError, match="objective: 'missing' is declared as nowhere:make, which cannot be loaded"):
        make_objective(config("missing"))
    with pytest.raises(ValueError, match=r"qlora_jax\.objectives: 'dpo' is taken"):
        q.register_objective("dpo", loss_declaration(cross_entropy))
