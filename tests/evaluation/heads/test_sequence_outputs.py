"""Outputs of packed texts equal those of each text alone, computed without packing or padding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.evaluation.batches import packed_batches
from qlora_jax.evaluation.heads.rows import sequence_outputs
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.nn.rope import RopeScaling
from qlora_jax.nn.sequence_head import HeadSpec
from tests.inference.tiny import VOCAB, tiny_config, tiny_parts

DYNAMIC = RopeScaling(kind="dynamic", numbers=(("factor", 8.0),))


def with_head(spec: HeadSpec, **changes: Any) -> ModelParts:
    model = combine(tiny_parts(**changes))
    model.add_sequence_head(spec, jax.random.key(0), 0.5)
    return partition(model)


@jax.jit
def _alone(parts: ModelParts, ids_1T: jax.Array) -> jax.Array:
    model = combine(parts)
    assert model.score is not None
    return model.score(model.hidden(ids_1T), jnp.zeros_like(ids_1T), 1)[0, 0]


def alone(parts: ModelParts, ids: np.ndarray) -> np.ndarray:
    return np.asarray(_alone(parts, jnp.asarray(ids)[None]))


def texts_of(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize(
    ("windows", "spec"),
    [((9, None), HeadSpec(outputs=3)), ((), HeadSpec(outputs=0, pooling="mean"))],
)
def test_each_text_has_the_outputs_that_it_has_alone(windows, spec, tmp_path):
    parts = with_head(spec, windows=windows)
    texts = texts_of(600, *[20] * 200, 33, 33, 1)
    assert max(len(pack) for batch in packed_batches([*map(len, texts)]) for pack in batch.packs) > 20
    done: list[int] = []
    cache = ResultCache(tmp_path, "model")
    found = sequence_outputs(parts, texts, done.append, cache)
    for index in (0, 1, 150, 201, 202):
        np.testing.assert_allclose(found[index], alone(parts, texts[index]), rtol=1e-5, atol=1e-5)
    assert done[-1] == len(texts) and done == sorted(done) and cache.misses == len(done) > 1
    np.testing.assert_array_equal(sequence_outputs(parts, texts, cache=cache), found)
    assert cache.hits == len(done)


def test_a_long_text_does_not_change_rotations_of_short_ones():
    rope = dataclasses.replace(tiny_config(64).rope, scaling=DYNAMIC)
    parts = with_head(HeadSpec(outputs=3), rope=rope)
    texts = texts_of(600, *[20] * 200)
    np.testing.assert_allclose(sequence_outputs(parts, texts)[150], alone(parts, texts[150]), rtol=1e-5, atol=1e-5)
