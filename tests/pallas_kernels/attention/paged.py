"""Pages of a key-value cache for tests, and attention of one token per row by its definition in f64."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.pages import PAGE, KVPages

SCALE = 0.3
LAYERS, LAYER = 2, 1


class Call(NamedTuple):
    """One call: queries, pages, and each row's keys and values [N, positions, H] as the pages hold them."""

    q: jnp.ndarray
    pages: KVPages
    positions: tuple[int, ...]
    k: list[np.ndarray]
    v: list[np.ndarray]

    def plain(self, window=None, softcap=None, sinks_N=None):
        """Computes transformers' definition; the sink is one more logit, whose weight is dropped."""
        found = []
        for row, position in enumerate(self.positions):
            seen = slice(0 if window is None else max(position - window + 1, 0), position + 1)
            scores = SCALE * np.einsum("nh,nsh->ns", np.asarray(self.q[row], np.float64), self.k[row][:, seen])
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            sinks = np.empty((len(scores), 0)) if sinks_N is None else np.asarray(sinks_N, np.float64)[:, None]
            logits = np.concatenate([scores, sinks], axis=1)
            weights = np.exp(logits - np.max(logits, axis=1, initial=-1e30, keepdims=True))
            weights = weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)
            found.append(np.einsum("ns,nsh->nh", weights[:, : scores.shape[1]], self.v[row][:, seen]))
        return np.stack(found)


def call(positions, heads, kv_heads, head_dim, dtype=jnp.float32, *, coded=False, seed=0, size=1.0, blocks=None):
    """Draws a call; positions that no row sees are NaN, as another row may have left them."""
    rng = np.random.default_rng([seed, head_dim])
    blocks = blocks or max(positions) // PAGE + 1
    shape = (len(positions), kv_heads, blocks * PAGE, head_dim)
    q = jnp.asarray(rng.standard_normal((len(positions), heads, head_dim)), dtype)
    seen = np.arange(blocks * PAGE) <= np.asarray(positions)[:, None, None]
    numbers = [np.asarray(jnp.asarray(s * rng.standard_normal(shape), dtype), np.float64) for s in (1.0, size)]
    table = rng.permutation(LAYERS * len(positions) * blocks) + 1
    table = table.reshape(LAYERS, len(positions), blocks)
    held, scales, exact = [], [], []
    for x in numbers:
        factors = np.max(np.abs(x), axis=-1).astype(np.float32) / 127
        codes = np.round(x / factors[..., None]) if coded else np.where(seen[..., None], x, np.nan)
        held.append(_in_pages(codes, table, jnp.int8 if coded else dtype))
        scales.append(_in_pages(np.where(seen, factors, np.nan), table, jnp.float32) if coded else None)
        exact.append(codes * factors[..., None].astype(np.float64) if coded else x)
    k, v = ([np.repeat(row, heads // kv_heads, axis=0) for row in x] for x in exact)
    names = ("k", "v", "k_scale", "v_scale")
    pages = KVPages(**dict(zip(names, [*held, *scales], strict=True)), pages_LRI=jnp.asarray(table, jnp.int32))
    return Call(q, pages, tuple(positions), k, v)


def _in_pages(x_RKS, table, dtype):
    """Puts rows [R, K, positions, ...] into the pages of LAYER; other pages are NaN, or the largest code."""
    rows, kv_heads, _, *rest = x_RKS.shape
    split = np.moveaxis(x_RKS.reshape(rows, kv_heads, -1, PAGE, *rest), 2, 1)
    pages = np.full((table.max() + 1, kv_heads, PAGE, *rest), 127 if dtype == jnp.int8 else np.nan)
    pages[table[LAYER]] = split
    return jnp.asarray(pages, dtype)
