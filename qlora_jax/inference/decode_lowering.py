"""What replies will want of memory, from shapes alone.

Dimension key: B batch, T positions of a call, D embed.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from qlora_jax.inference.decode import BATCHES, advance, chunks, empty_cache, extend, round_up, slots_for
from qlora_jax.inference.lowering import Ahead, bytes_of, lowered
from qlora_jax.inference.sampling import Sampling
from qlora_jax.models.add_adapters import prepare_for_decoding
from qlora_jax.models.partition import ModelParts, combine


def decoding_ahead(parts: ModelParts, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Ahead]:
    """The programs of greedy replies to prompts that are decoded together: of their largest chunk, and of a token.

    What `prepare_for_decoding` makes of the model counts as held.
    """
    size, longest = round_up(len(prompts), BATCHES), max(map(len, prompts))
    settled, made = _settled(parts)

    def begun(parts: ModelParts):
        model = combine(parts)
        return empty_cache(model, size, slots_for(longest + max_new_tokens, model.config))

    last_BD, cache = jax.eval_shape(begun, settled)
    keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    tokens_BT = np.zeros((size, max(length for _, length in chunks(longest))), np.int32)
    place_B, shape = tokens_BT[:, 0], f"{size} x {cache.k.shape[3]} places of a cache"
    yield lowered(shape, extend, settled, (tokens_BT, place_B, place_B, last_BD, cache), made)
    yield lowered(shape, advance, settled, (place_B, place_B, cache, keys_B, np.int32(0)), made, sampling=Sampling())


def _settled(parts: ModelParts) -> tuple[ModelParts, int]:
    """(the shapes of what `prepare_for_decoding` returns, bytes of what it makes anew)."""
    settled = jax.eval_shape(prepare_for_decoding, parts)
    shared = [
        leaf
        for name, leaves in settled.lora.items()
        for at, leaf in leaves.items()
        if at in parts.lora[name] and leaf.dtype == parts.lora[name][at].dtype
    ]
    made = bytes_of(settled) - bytes_of((shared, parts.base))
    return settled, made
