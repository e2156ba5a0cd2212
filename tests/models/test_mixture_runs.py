"""A 4-bit mixture with adapters everywhere: on a mesh, and under every rematerialization, against one plain program."""

import dataclasses

import jax
import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition, place_parts, prepare_for_decoding
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.sharding import ROWS, make_mesh, named
from qlora_jax.training.step import gradients
from tests.marks import EXHAUSTIVE, some_in_ci
from tests.models.mixtures import EXPERT_TARGETS, NARROW, random_mixture
from tests.training.mesh_models import mesh_batch
from tests.training.test_step import relative

CONFIG = NARROW | dict(model_type="glm4_moe", n_routed_experts=8, first_k_dense_replace=1, moe_intermediate_size=64)
LORA = LoraArgs(rank=16, target_parameters=[*EXPERT_TARGETS, "mlp.gate"])
SHAPE = (2, 4, 16)


@pytest.fixture(scope="module")
def parts():
    return random_mixture(CONFIG, LORA, WeightFormat(dtype="float32"))


@pytest.fixture(scope="module")
def plain(parts):
    return gradients(parts, mesh_batch(CONFIG, SHAPE), None, remat="none")


def check(found, expected, tolerance: float) -> None:
    (grads, loss), (expected_grads, expected_loss) = found, expected
    np.testing.assert_allclose(loss.row_losses_AB, expected_loss.row_losses_AB, rtol=tolerance)
    assert max(jax.tree.leaves(jax.tree.map(relative, grads, expected_grads))) < tolerance


@pytest.mark.parametrize("remat", [pytest.param(name, marks=EXHAUSTIVE) for name in REMAT_POLICIES if name != "none"])
def test_rematerialization_changes_nothing(parts, plain, remat):
    check(gradients(parts, mesh_batch(CONFIG, SHAPE), None, remat=remat), plain, 1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_mesh_changes_gradients_by_rounding_alone(parts, plain):
    mesh = make_mesh(2, 2)
    spread = jax.device_put(mesh_batch(CONFIG, SHAPE), named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    found = gradients(place_parts(parts, mesh), spread, None, remat="names", mesh=mesh)
    check(found, plain, 1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_bfloat16_is_near(plain):
    bf16 = random_mixture(CONFIG, dataclasses.replace(LORA, dtype="bfloat16"), WeightFormat(dtype="bfloat16"))
    _, loss = gradients(bf16, mesh_batch(CONFIG, SHAPE), None, remat="names")
    np.testing.assert_allclose(loss.row_losses_AB, plain[1].row_losses_AB, rtol=0.05)


METHODS = ("dora", "lora_fa", "ia3", "oft", "vera", "ln_tuning", "bitfit", "houlsby", "pfeiffer")


@pytest.mark.parametrize("method", some_in_ci([(method,) for method in METHODS], lambda index: index == 0))
def test_other_methods_train_every_layer_that_has_their_modules(method):
    """Dense MLPs are in one layer and shared experts in two, so their adapters have stacks of different lengths."""
    features = model_config(CONFIG | dict(attention_bias=True, intermediate_size=64))

    def step(batch):
        model = CausalLM(features, WeightFormat())
        attach_method(model, LoraArgs(method=method), jax.random.key(0))
        parts = partition(model)
        prepare_for_decoding(parts)
        return parts.trained, gradients(parts, batch, None, remat="names")[0]

    trained, grads = jax.eval_shape(step, mesh_batch(CONFIG, SHAPE))
    assert jax.tree.map(lambda leaf: leaf.shape, grads) == jax.tree.map(lambda leaf: leaf.shape, trained)
    for name, leaves in trained.items():
        stacks = {leaf.shape[0] for leaf in leaves.values()}
        assert name == "model.norm" or stacks == {len(features.layers_with(name.removeprefix("model.layers.")))}
