"""Rows of new tokens against torch, in f32, for every family: logits, loss, and the gradient of each row.

The oracle's tables are longer and train whole; the gradient of its new rows is ours.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.trainable_embeddings import add_token_rows
from qlora_jax.training.step import row_nll
from tests.models.cached import empty_cache, extend
from tests.parity.test_families_transformers import CONFIGS, LENGTH, VOCAB

SCRIPT = Path(__file__).parent.parent / "oracle/token_rows.py"
TOLERANCE = 1e-4
NAMES = [
    name for name in CONFIGS if name not in ("mistral_no_window", "smollm3_window", "gemma2_plain", "qwen3_window")
]
NEW = 3
TABLES = {"embedding": "model.embed_tokens", "head": "lm_head"}


def _model(folder: Path):
    source = open_model(folder)
    model = load_model(source, model_config(source.config), WeightFormat(quant_type=None, dtype="float32")).model
    add_token_rows(model, tuple(range(VOCAB, VOCAB + NEW)), "float32")
    return partition(model)


def _ours(folder: Path, tokens: np.ndarray, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    parts = _model(folder)
    lora = {name: {"rows": jnp.asarray(rows[name])} for name in parts.lora}
    tokens, targets = jnp.asarray(tokens), jnp.roll(jnp.asarray(tokens), -1, axis=1)
    weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)
    micro = {"inputs": tokens, "targets": targets, "weights": weights}

    @jax.jit
    def loss(lora):
        return row_nll(combine(parts.with_lora(lora)), micro, remat="names", keys_B=None).sum()

    nll, gradients = jax.value_and_grad(loss)(lora)
    model = combine(parts.with_lora(lora))
    logits = model.head.logits(model.hidden(tokens)).reshape(*tokens.shape, -1)
    of_rows = {short: gradients[name]["rows"] for short, name in TABLES.items() if name in gradients}
    hidden, _ = extend(model, tokens[:1], 0, empty_cache(model.config, 1, LENGTH), LENGTH)
    decoded = model.head.logits(hidden)
    np.testing.assert_allclose(decoded, logits[0], atol=TOLERANCE * np.abs(logits[0]).max())
    return {"logits": logits, "nll": nll, **of_rows}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_family(oracle, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCAB + NEW, (2, LENGTH)).astype(np.int32)
    tokens[:, 5::6] = VOCAB + np.arange(12).reshape(2, 6) % NEW
    rows, head_rows = (rng.normal(0, 0.1, (NEW, 64)).astype(np.float32) for _ in range(2))
    configs = {name: CONFIGS[name] for name in NAMES}
    found = oracle(SCRIPT, configs=configs, folder=str(tmp_path), tokens=tokens, rows=rows, head_rows=head_rows)
    errors = {}
    for name in NAMES:
        wanted = {key.removeprefix(f"{name}/"): v for key, v in found.items() if key.startswith(f"{name}/")}
        ours = _ours(tmp_path / name, tokens, {"model.embed_tokens": rows, "lm_head": head_rows})
        assert ours.keys() == wanted.keys(), name
        for key, value in wanted.items():
            errors[f"{name}, {key}"] = float(np.abs(ours[key] - value).max() / np.abs(value).max())
    assert max(errors.values()) < TOLERANCE, {name: error for name, error in errors.items() if error >= TOLERANCE}
