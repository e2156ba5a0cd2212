"""The loss and the gradients of supervised finetuning, against optax' cross-entropy of the model's logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.models.partition import Lora, combine
from qlora_jax.training.step import gradients
from tests.inference.tiny import VOCAB, tiny_parts

A, B, T = 2, 2, 12
LENGTHS_AB1 = np.array([[[12], [7]], [[3], [9]]])


def batch_of_four_rows() -> dict[str, np.ndarray]:
    """Returns two micro-batches of two rows; the second half of each row is the answer."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (A, B, T + 1), dtype=np.int32)
    position = np.arange(T)
    weights = ((position < LENGTHS_AB1) & (position >= LENGTHS_AB1 // 2)).astype(np.float32)
    return {"inputs": ids[..., :-1], "targets": ids[..., 1:], "weights": weights}


def test_the_loss_is_the_mean_over_supervised_tokens():
    parts, batch = tiny_parts(), batch_of_four_rows()
    targets, weights = batch["targets"].reshape(-1), batch["weights"]

    def losses_AB(lora: Lora) -> jax.Array:
        model = combine(parts.with_lora(lora))
        logits = model.head.logits(model.hidden(jnp.asarray(batch["inputs"].reshape(A * B, T))))
        nll = optax.softmax_cross_entropy_with_integer_labels(logits.reshape(-1, VOCAB), targets)
        return (nll.reshape(weights.shape) * weights).sum(-1)

    expected = jax.grad(lambda lora: losses_AB(lora).sum() / weights.sum())(parts.lora)
    found, loss = gradients(parts, jax.tree.map(jnp.asarray, batch), None, remat="full")
    assert loss.count == weights.sum() == 17
    np.testing.assert_allclose(loss.row_losses_AB, losses_AB(parts.lora), rtol=1e-5)
    np.testing.assert_allclose(loss.total, losses_AB(parts.lora).sum(), rtol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale), found, expected)
