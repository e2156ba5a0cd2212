"""Adapters on some layers: against a model with adapters on all, whose others are zero, and what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.models.decoder import layer_runs
from qlora_jax.models.partition import ModelParts, combine, place_parts
from qlora_jax.sharding import ROWS, make_mesh, named
from qlora_jax.training.step import gradients
from tests.models.cached import empty_cache, extend
from tests.training.mesh_models import WHOLE_VOCABULARY, mesh_batch, mesh_config, mesh_parts
from tests.training.test_step import relative

LAYERS = 5
CONFIG = mesh_config(WHOLE_VOCABULARY, num_hidden_layers=LAYERS)
ALL = LoraArgs(rank=16, target_modules=["q_proj", "down_proj"])
# q_proj on layers 1 and 3, down_proj on 1 and 2: four runs.
REGEX = r"model\.layers\.[13]\.self_attn\.q_proj|model\.layers\.[12]\.mlp\.down_proj"
SOME = dataclasses.replace(ALL, target_modules=REGEX)
CHOSEN = {"model.layers.self_attn.q_proj": (1, 3), "model.layers.mlp.down_proj": (1, 2)}
SHAPE = (2, 4, 32)


def with_zeros(lora: dict, whole: ModelParts) -> dict:
    """Returns adapters on all layers, those that are not chosen zero."""

    def stack(values: jax.Array, like: jax.Array, layers: tuple[int, ...]) -> jax.Array:
        return jnp.zeros_like(like).at[jnp.asarray(layers)].set(values)

    return {
        name: {leaf: stack(values, whole.lora[name][leaf], CHOSEN[name]) for leaf, values in leaves.items()}
        for name, leaves in lora.items()
    }


def _runs(parts: ModelParts) -> list[range]:
    model = combine(parts)
    return layer_runs(model.model.layers, model.config)


def test_stacks_have_the_chosen_layers():
    parts = mesh_parts(CONFIG, lora=SOME)
    assert {name: {leaf.shape[0] for leaf in leaves.values()} for name, leaves in parts.lora.items()} == {
        "model.layers.self_attn.q_proj": {2},
        "model.layers.mlp.down_proj": {2},
    }
    assert _runs(parts) == [*map(range, (0, 1, 2, 3, 4), (1, 2, 3, 4, 5))]
    whole = mesh_parts(CONFIG, lora=ALL)
    assert _runs(whole) == [range(LAYERS)]
    tail = mesh_parts(CONFIG, lora=dataclasses.replace(ALL, layers_to_transform="3-4"))
    assert _runs(tail) == [range(3), range(3, LAYERS)]


@pytest.mark.parametrize("remat", ["names", pytest.param("none", marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_those_of_zeros_elsewhere(remat):
    batch, parts, whole = mesh_batch(CONFIG, SHAPE), mesh_parts(CONFIG, lora=SOME), mesh_parts(CONFIG, lora=ALL)
    grads, loss = gradients(parts, batch, None, remat=remat)
    expected, expected_loss = gradients(whole.with_lora(with_zeros(parts.lora, whole)), batch, None, remat=remat)
    np.testing.assert_allclose(loss.row_losses_AB, expected_loss.row_losses_AB, rtol=2e-7)
    for name, leaves in grads.items():
        for leaf, values in leaves.items():
            assert relative(values, expected[name][leaf][jnp.asarray(CHOSEN[name])]) < 1e-6, (name, leaf)


@pytest.mark.slow
def test_a_mesh_changes_gradients_by_rounding_alone():
    parts, batch, mesh = mesh_parts(CONFIG, lora=SOME), mesh_batch(CONFIG, SHAPE), make_mesh(2, 2)
    expected, loss = gradients(parts, batch, None, remat="names")
    spread = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    found, loss_on_mesh = gradients(place_parts(parts, mesh), spread, None, remat="names", mesh=mesh)
    np.testing.assert_allclose(loss_on_mesh.row_losses_AB, loss.row_losses_AB, rtol=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(relative, found, expected))) < 2e-6


@pytest.mark.slow
def test_decoding_with_a_cache_equals_the_forward_pass():
    model = combine(mesh_parts(CONFIG, lora=SOME))
    tokens = mesh_batch(CONFIG, (1, 2, 16))["inputs"][0]
    expected = np.asarray(model.hidden(tokens)).reshape(2, 16, -1)
    first, cache = extend(model, tokens[:, :10], 0, empty_cache(model.config, 2, 16), 16)
    rest, _ = extend(model, tokens[:, 10:], 10, cache, 16)
    found = np.concatenate([np.asarray(first).reshape(2, 10, -1), np.asarray(rest).reshape(2, 6, -1)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
