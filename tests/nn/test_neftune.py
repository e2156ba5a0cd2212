"""NEFTune's noise: its bound and distribution, those of transformers' hook, and where a model adds it."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.nn.neftune import add_noise
from qlora_jax.nn.random_keys import fold_in_rows
from tests.io.gguf_families import FAMILIES

ORACLE = Path(__file__).parent.parent / "oracle/neftune.py"
B, T, D, ALPHA = 4, 50, 96, 5.0
BOUND = ALPHA / math.sqrt(T * D)


def keys_of(rows: list[int]) -> jax.Array:
    return fold_in_rows(jax.random.key(7), jnp.asarray(rows, jnp.int32))


def noise_of(rows: list[int], dtype: str = "float32") -> np.ndarray:
    """Returns the noise of these rows of a step, [B, T, D]."""
    x_MD = jnp.zeros((len(rows) * T, D), dtype)
    noisy = add_noise(x_MD, ALPHA, keys_of(rows))
    assert noisy.dtype == dtype
    return np.asarray(noisy, np.float32).reshape(len(rows), T, D)


def test_it_is_uniform_within_the_bound():
    noise = noise_of([0, 1, 2, 3])
    assert 0.999 * BOUND < np.abs(noise).max() <= BOUND
    assert scipy.stats.kstest(noise.ravel(), "uniform", args=(-BOUND, 2 * BOUND)).pvalue > 0.01
    pairs = noise.reshape(-1, 2)
    assert abs(scipy.stats.pearsonr(pairs[:, 0], pairs[:, 1]).statistic) < 4 / math.sqrt(len(pairs))


def test_it_is_added_in_the_dtype_of_the_embeddings():
    np.testing.assert_allclose(noise_of([0, 1], "bfloat16"), noise_of([0, 1]), rtol=2**-8)


def test_it_depends_on_the_row_alone():
    """Other rows of the batch, and the place in it, do not matter."""
    whole = noise_of([0, 1, 2, 3])
    np.testing.assert_array_equal(noise_of([3, 1]), whole[[3, 1]])
    assert np.all(np.abs(np.corrcoef(whole.reshape(B, -1))[np.triu_indices(B, 1)]) < 4 / math.sqrt(T * D))


@pytest.mark.slow
def test_it_is_distributed_as_that_of_transformers(oracle):
    found = oracle(ORACLE, vocab=32, width=D, shape=[B, T], alpha=ALPHA)
    assert not found["evaluation"].any()
    # Their noise is a difference of f32 embeddings of size 1 to 4.
    assert np.abs(found["train"]).max() == pytest.approx(np.abs(noise_of([0, 1, 2, 3])).max(), rel=1e-3)
    assert scipy.stats.ks_2samp(found["train"].ravel(), noise_of([0, 1, 2, 3]).ravel()).pvalue > 0.01


@pytest.mark.parametrize("family", ["gemma2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_model_adds_it_after_the_scale_of_the_embedding_and_in_training_only(family):
    """Layers of zeros add nothing, so the hidden state before the last norm is the embedding."""
    config = model_config(FAMILIES[family][1])
    model = CausalLM(config, WeightFormat(quant_type=None, dtype="float32"))
    tokens, keys_B = jnp.zeros((B, T), jnp.int32), keys_of([0, 1, 2, 3])
    model.model.norm = lambda x_MD: x_MD
    noisy = np.asarray(model.hidden(tokens, keys_B=keys_B, neftune_noise_alpha=ALPHA)).reshape(B, T, -1)
    bound = ALPHA / math.sqrt(T * config.embed_dim)
    assert 0.99 * bound < np.abs(noisy).max() <= bound
    assert len({row.tobytes() for row in noisy}) == B
    for without in ({}, {"keys_B": keys_B}, {"neftune_noise_alpha": ALPHA}):
        assert not np.asarray(model.hidden(tokens, **without)).any()
