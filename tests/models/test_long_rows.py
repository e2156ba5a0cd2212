"""Rows so long that the MLP of a recomputed layer runs on chunks of their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models import decoder, mlp
from qlora_jax.nn.dropout import dropout
from qlora_jax.training.step import gradients
from tests.training.mesh_models import WHOLE_VOCABULARY, mesh_batch, mesh_config, mesh_parts

SHAPE = (1, 2, 64)
CONFIG = mesh_config(WHOLE_VOCABULARY)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 22 tokens, the last of which is padded."""
    jax.clear_caches()
    for module in (decoder, mlp):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", 24)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_chunks_change_gradients_by_rounding_alone(remat, short_chunks):
    parts, batch = mesh_parts(CONFIG), mesh_batch(CONFIG, SHAPE)
    grads, loss = gradients(parts, batch, None, remat=remat)
    text = gradients.lower(parts, batch, None, remat=remat).as_text()
    assert (
        f"tensor<128x{CONFIG['intermediate_size']}x" not in text and f"tensor<22x{CONFIG['intermediate_size']}x" in text
    )
    expected_grads, expected = gradients(parts, batch, None, remat="names")
    assert f"tensor<128x{CONFIG['intermediate_size']}x" in gradients.lower(parts, batch, None, remat="names").as_text()
    np.testing.assert_allclose(loss.row_losses_AB, expected.row_losses_AB, rtol=1e-6)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)


def test_each_chunk_of_each_row_has_its_own_dropout(short_chunks):
    x_MD = jnp.ones((128, 8))
    keys_B = jax.random.split(jax.random.key(0))

    def kept(x_MD, rows, keys_B):
        return np.asarray(mlp.by_chunks(lambda x, keys: dropout(x, 0.5, keys), x_MD, keys_B, rows)) > 0

    masks = kept(x_MD, 2, keys_B)
    np.testing.assert_array_equal(masks[64:], kept(x_MD[64:], 1, keys_B[1:]))  # whichever row is beside it
    chunks = [masks[start : start + 20] for start in (0, 22, 44, 64, 86, 108)]
    assert len({chunk.tobytes() for chunk in chunks}) == 6
