"""Several replies to each prompt are those of one call of `generate`, and are cached batch by batch."""

import numpy as np

from qlora_jax.inference.decode import generate
from qlora_jax.inference.replies import sampled_replies
from qlora_jax.inference.result_cache import open_cache
from qlora_jax.inference.sampling_params import Sampling
from tests.inference.tiny import VOCAB, tiny_parts


def test_samples_differ_and_are_cached(tmp_path):
    parts, rng = tiny_parts(), np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, 5).tolist() for _ in range(12)]
    how = dict(sampling=Sampling(temperature=1.0, seed=3), max_new_tokens=4, stop_ids=[])
    for misses in (2, 0):
        cache, done = open_cache(tmp_path, parts), []
        replies = sampled_replies(parts, prompts, samples=6, progress=done.append, cache=cache, **how)
        assert (cache.misses, cache.hits) == (misses, 2 - misses) and done == [10, 12]
    for prompt, found in zip(prompts, replies, strict=True):
        assert found == generate(parts, [prompt] * 6, **how)
        assert len({tuple(reply.ids) for reply in found}) > 1
