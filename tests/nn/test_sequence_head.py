"""Pooling over slots against slices of the hidden states, and the head in place of the language-model head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.trainable_embeddings import tables
from qlora_jax.nn.sequence_head import POOLINGS, HeadSpec, SequenceHead
from tests.io.tiny_models import tiny_config

# A trunk and two branches; one long sequence; padding at the end of both rows.
SEQUENCES = np.array([[3, 3, 0, 0, 1, 1, 1, 3], [0, 0, 0, 0, 0, 0, 3, 3]], np.int32)
SLOTS = 3
MEMBERS = {(0, 0): slice(2, 4), (0, 1): slice(4, 7), (1, 0): slice(0, 6)}


def hidden_states() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (*SEQUENCES.shape, 5))


def expected_state(hidden: np.ndarray, pooling: str, place: tuple[int, int]) -> np.ndarray:
    states = hidden[place[0], MEMBERS[place]]
    return states[-1] if pooling == "last" else states.mean(0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pools_each_sequence_and_gives_zero_for_empty_slots(pooling):
    hidden = hidden_states()
    pooled = np.asarray(POOLINGS[pooling](hidden, jnp.asarray(SEQUENCES), SLOTS))
    for place in np.ndindex(2, SLOTS):
        wanted = expected_state(np.asarray(hidden), pooling, place) if place in MEMBERS else np.zeros(5)
        np.testing.assert_allclose(pooled[place], wanted, atol=1e-6)


def test_gradients_reach_only_pooled_positions():
    weights = jnp.arange(1.0, 7.0).reshape(2, SLOTS)[..., None]
    of_last = jax.grad(lambda h: jnp.sum(POOLINGS["last"](h, jnp.asarray(SEQUENCES), SLOTS) * weights))(hidden_states())
    reached = {(row, places.stop - 1): weights[row, slot, 0] for (row, slot), places in MEMBERS.items()}
    for place in np.ndindex(*SEQUENCES.shape):
        np.testing.assert_array_equal(of_last[place], reached.get(place, 0.0))


def test_scores_are_products_with_the_matrix_in_f32():
    head = SequenceHead.init(jax.random.key(1), 5, HeadSpec(outputs=4), 0.5)
    hidden = hidden_states().astype(jnp.bfloat16)
    scores = head(hidden.reshape(-1, 5), jnp.asarray(SEQUENCES), SLOTS)
    assert head.adapter is not None and scores.dtype == jnp.float32
    expected = np.asarray(hidden[0, 3], np.float64) @ np.asarray(head.adapter.weight[...], np.float64)
    np.testing.assert_allclose(scores[0, 0], expected, rtol=1e-5)


def test_a_head_without_outputs_returns_the_pooled_states():
    head = SequenceHead.init(jax.random.key(1), 5, HeadSpec(outputs=0, pooling="mean"))
    assert head(hidden_states().reshape(-1, 5), jnp.asarray(SEQUENCES), SLOTS).shape == (2, SLOTS, 5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_trains_in_the_adapters_partition_and_replaces_the_lm_head(tied):
    model = CausalLM(model_config(tiny_config(tie_word_embeddings=tied)), WeightFormat(quant_type=None))
    model.add_sequence_head(HeadSpec(outputs=3), jax.random.key(0))
    parts = partition(model)
    assert parts.lora["score"]["weight"].shape == (64, 3)
    assert "lm_head" not in parts.base and [name for name, _ in tables(model)] == ["model.embed_tokens"]
    again = combine(parts)
    assert again.score is not None and again.score.adapter is not None
    np.testing.assert_array_equal(again.score.adapter.weight[...], parts.lora["score"]["weight"])
    with pytest.raises(ValueError, match="no language-model head"):
        _ = again.head


def test_initial_values_follow_the_seed_and_the_range():
    draws = [SequenceHead.init(jax.random.key(seed), 64, HeadSpec(outputs=50), 0.1) for seed in (0, 0, 1)]
    weights = [np.asarray(head.adapter.weight[...]) for head in draws if head.adapter is not None]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2]) and abs(weights[0].std() - 0.1) < 0.005
