"""The step of each objective on four virtual devices and in other micro-batches against one batch on one device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.config import LoraArgs
from qlora_jax.models.partition import place_parts
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.objectives.cpo import CPO
from qlora_jax.objectives.dpo import DPO
from qlora_jax.objectives.embedding import Embedding
from qlora_jax.objectives.head_objective import head_spec
from qlora_jax.objectives.kto import KTO
from qlora_jax.objectives.objective import Objective
from qlora_jax.objectives.orpo import ORPO
from qlora_jax.objectives.policy_gradient import PolicyGradient
from qlora_jax.objectives.reward import MARGINS, Reward
from qlora_jax.sharding import ROWS, make_mesh, named
from qlora_jax.training import step
from qlora_jax.training.step import gradients
from tests.training.mesh_models import WHOLE_VOCABULARY, mesh_config, mesh_parts
from tests.training.policy_rows import policy_arrays, random_replies
from tests.training.preference_rows import batch_of, labelled_rows, pair_rows, random_labelled, random_pairs
from tests.training.test_step import relative

pytestmark = pytest.mark.slow
ROWS_OF_STEP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoupledPolicy(PolicyGradient):
    """A policy gradient whose rows' losses are computed at once, as with load balancing."""

    is_coupled: bool = dataclasses.field(default=True, init=False)


def policy_batch() -> dict[str, np.ndarray]:
    """Eight prompts with two replies each, and log p near that of the model without adapter."""
    rng = np.random.default_rng(5)
    prompts, replies = random_replies(ROWS_OF_STEP, 2, vocabulary=WHOLE_VOCABULARY)
    logps = [[rng.uniform(-6, -5, len(reply)).tolist() for reply in group] for group in replies]
    shape = (ROWS_OF_STEP, 2)
    return policy_arrays(
        prompts,
        replies,
        [[[index] for index in range(ROWS_OF_STEP)]],
        advantages=rng.normal(size=shape),
        token_scale=rng.uniform(0.1, 0.2, shape),
        trained=rng.random(shape) < 0.8,
        of_tokens=dict.fromkeys(("old_logps", "reference_logps", "sampler_logps"), logps),
    )


def batch_of_eight(objective: Objective) -> dict[str, np.ndarray]:
    """Eight rows in one micro-batch, with a reference for some of which z is positive."""
    if isinstance(objective, PolicyGradient):
        return policy_batch()
    vocabulary, rng = WHOLE_VOCABULARY, np.random.default_rng(5)
    reference = -rng.uniform(50, 120, (ROWS_OF_STEP, 2))
    if objective.row_kind in ("pair", "embedding"):
        rows = pair_rows(random_pairs(ROWS_OF_STEP, vocabulary=vocabulary), reference)
        rows = dataclasses.replace(
            rows, values={MARGINS: rng.uniform(0, 1, (ROWS_OF_STEP, 2)).astype(np.float32), **rows.values}
        )
    else:
        rows = labelled_rows(random_labelled(ROWS_OF_STEP, vocabulary=vocabulary), reference, kl=objective.kl_pairs)
    chosen = [[[index] for index in range(ROWS_OF_STEP)]]
    return batch_of(rows, chosen, 64, packed=False, sequences=objective.sequences_per_row).arrays()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("objective", "remat", "dropout"),
    [
        (KTO(), "names", 0.3),
        (KTO(loss_type="apo_zero_unpaired"), "full", 0.0),
        (DPO(), "names", 0.3),
        (DPO(loss_type="ipo"), "full", 0.0),
        (CPO(loss_type="simpo", beta=2.0, gamma=0.5), "names", 0.0),
        (ORPO(), "full", 0.3),
        (Reward(center_rewards_coefficient=0.1), "names", 0.0),
        (PolicyGradient(sequences_per_row=2, stored_old=True, beta=0.1, level="sequence"), "names", 0.3),
        (CoupledPolicy(sequences_per_row=2, stored_old=True, beta=0.1), "names", 0.0),
        (Embedding(head=HeadSpec(outputs=0)), "names", 0.3),
        (Embedding(head=HeadSpec(outputs=0, pooling="mean"), temperature=0.2), "full", 0.0),
    ],
    ids=repr,
)
def test_a_mesh_and_other_micro_batches_change_rounding_alone(objective: Objective, remat: str, dropout: float):
    """1 x 8 rows on one device, and 2 x 4 on a mesh of 2 x 2."""
    lora = LoraArgs(rank=16, dropout=dropout, target_modules=["q_proj", "down_proj"])
    parts = mesh_parts(mesh_config(WHOLE_VOCABULARY), lora=lora, head=head_spec(objective))
    mesh = make_mesh(2, 2)
    key = jax.random.key(3) if dropout else None
    batch = batch_of_eight(objective)
    expected_grads, expected = gradients(parts, batch, key, remat=remat, objective=objective)
    split = {name: array.reshape(2, 4, *array.shape[2:]) for name, array in batch.items()}
    spread = jax.device_put(split, named(mesh, P(None, ROWS)))
    grads, loss = gradients(place_parts(parts, mesh), spread, key, remat=remat, mesh=mesh, objective=objective)
    np.testing.assert_allclose(loss.row_losses_AB.ravel(), expected.row_losses_AB.ravel(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss.total / loss.count, expected.total / expected.count, rtol=2e-6)
    outputs, expected_outputs = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found.outputs)]) for found in (loss, expected)
    )
    np.testing.assert_allclose(outputs, expected_outputs, rtol=1e-6, atol=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(relative, grads, expected_grads))) < 1e-5


@pytest.mark.parametrize(("micro_batches", "forward_passes"), [(1, 1), (2, 2)])
def test_one_micro_batch_is_computed_once(monkeypatch, micro_batches: int, forward_passes: int):
    """A loss that reads the outputs of all rows first computes several micro-batches again for their gradients."""
    calls, objective = [], KTO(beta=0.07)  # no other test compiles it
    row_outputs = step.row_outputs
    monkeypatch.setattr(step, "row_outputs", lambda *args, **how: calls.append(1) or row_outputs(*args, **how))
    parts = mesh_parts(mesh_config(WHOLE_VOCABULARY), lora=LoraArgs(rank=2, target_modules=["q_proj"]))
    batch = {
        name: array.reshape(micro_batches, -1, *array.shape[2:]) for name, array in batch_of_eight(objective).items()
    }
    gradients.lower(parts, batch, None, remat="names", objective=objective)
    assert len(calls) == forward_passes
