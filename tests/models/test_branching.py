"""Tests rows with branches in every family: hidden states and gradients equal those of each text in a row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.attention.branching import Branching
from qlora_jax.config import LoraArgs
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from tests.nn.trees import row_of_trees
from tests.parity.test_families_transformers import CONFIGS, VOCAB

LENGTH = 88
# Windows of 9 positions end in the trunk, at its end, and in the branch; two texts without a trunk; padding.
TREES = (
    [(20, [(20, 12), (13, 9), (0, 4), (19, 1)]), (0, [(0, 15), (0, 10)]), (3, [])],
    [(30, [(30, 20), (7, 8), (30, 11)]), (1, [(1, 10)])],
)
IN_CI = ("gemma2", "smollm3_window")  # windows of some and of all layers, soft caps, layers without rotation


def _marks(name):
    return [pytest.mark.slow] if name in IN_CI else [pytest.mark.slow, pytest.mark.exhaustive]


def _parts(config):
    def build():
        model = CausalLM(config, WeightFormat(quant_type=None, dtype="float32"))
        attach_method(model, LoraArgs(rank=2), jax.random.key(0))
        return model

    graphdef, shapes = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(0)
    return partition(nnx.merge(graphdef, jax.tree.map(lambda leaf: _random(rng, leaf.shape), shapes)))


def _random(rng, shape):
    return jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)


@jax.jit
def _states_and_gradients(parts, tokens_BT, cotangent_BTD, segments_BT=None, branching=None):
    def weighted(lora):
        model = combine(parts.with_lora(lora))
        hidden_MD = model.hidden(tokens_BT, segments_BT=segments_BT, branching=branching)
        states_BTD = hidden_MD.reshape(cotangent_BTD.shape)
        return jnp.sum(states_BTD * cotangent_BTD), states_BTD

    return jax.grad(weighted, has_aux=True)(parts.lora)


def _texts(row_4T):
    """Yields, for each trunk and branch, its own positions in the row, and those of the whole text."""
    segments, parents, depths, _ = row_4T
    for segment in np.unique(segments):
        own = np.flatnonzero(segments == segment)
        before = np.flatnonzero(segments == parents[own[0]])[: depths[own[0]]]
        yield own, np.concatenate([before, own])


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in CONFIGS])
def test_a_branch_is_the_text_alone(name):
    config = model_config(dict(model_type="llama") | CONFIGS[name])
    if config.rotations_depend_on_length:
        pytest.skip("its rotations depend on the length of the row")
    parts, rng = _parts(config), np.random.default_rng(1)
    rows_B4T = np.stack([row_of_trees(LENGTH, trees) for trees in TREES])
    tokens_BT = rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    cotangent_BTD = rng.standard_normal((2, LENGTH, config.embed_dim)).astype(np.float32)

    texts = [(row, own, whole) for row in range(2) for own, whole in _texts(rows_B4T[row])]
    alone_tokens = np.zeros((len(texts), LENGTH), np.int32)
    alone_cotangent = np.zeros((len(texts), *cotangent_BTD.shape[1:]), np.float32)
    for index, (row, own, whole) in enumerate(texts):
        alone_tokens[index, : len(whole)] = tokens_BT[row, whole]
        alone_cotangent[index, len(whole) - len(own) : len(whole)] = cotangent_BTD[row, own]
    expected, alone = _states_and_gradients(parts, alone_tokens, alone_cotangent)

    segments, parents, depths, _ = (jnp.asarray(rows_B4T[:, i]) for i in range(4))
    gradients, states = _states_and_gradients(parts, tokens_BT, cotangent_BTD, segments, Branching(parents, depths))
    # Rounding alone: the same texts after a change of all weights by half a unit in the last place.
    rounded, moved = _states_and_gradients(_nudged(parts), alone_tokens, alone_cotangent)
    found = np.concatenate([states[row, own] for row, own, _ in texts])
    rows = [(index, slice(len(whole) - len(own), len(whole))) for index, (_, own, whole) in enumerate(texts)]
    before, after = (np.concatenate([each[row] for row in rows]) for each in (alone, moved))
    _check_rounding(found, before, after)
    for each in zip(*map(jax.tree.leaves, (gradients, expected, rounded)), strict=True):
        _check_rounding(*each)


def _nudged(parts):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x * (1 + jnp.asarray(rng.choice([-6e-8, 6e-8], x.shape), x.dtype)), parts)


def _check_rounding(found, expected, moved):
    largest, noise = np.max(np.abs(expected)), np.max(np.abs(moved - expected))
    assert noise < 1e-3 * largest
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * noise + 1e-6 * largest)


def test_branches_are_segments():
    parts = _parts(model_config(CONFIGS["mistral"]))
    with pytest.raises(ValueError, match="branching without segments_BT"):
        combine(parts).hidden(jnp.zeros((1, 4), jnp.int32), branching=Branching(*(jnp.zeros((1, 4), jnp.int32),) * 2))
