"""Cross-entropy of the next token through a frozen head, never holding [tokens, vocab].

The head is read in tiles of its rows. As in flash attention, each tile's exp(logit - largest so far) is summed, and
multiplied with the tile itself, so one pass gives log-sum-exp and the gradient of the hidden states:

  nll = log sum_v exp(l_v) - l_target,    d nll / d hidden = (sum_v exp(l_v) w_v) / (sum_v exp(l_v)) - w_target

A head may add a bias, and cap its logits: l = c tanh(z / c). Each w_v is then multiplied with its slope
dl_v / dz_v = 1 - (l_v / c)^2.

Where rows of the head train beside the frozen ones, as those of new tokens do, log-sum-exp and target of the frozen
rows are what is differentiated by hand, and the few others are added to them.

Dimension key: M tokens, D embed, V vocab, N rows that train, C tokens of a chunk, I chunks, W rows of the head in a
tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.devices import target_device
from qlora_jax.nn.dots import dot_nn, dot_tn
from qlora_jax.nn.head import Head, HeadWithRows, WholeHead


class Tile(NamedTuple):
    """How much is computed at once: `tokens` hidden states with `rows` of the head."""

    tokens: int
    rows: int


# By platform. On CPUs [256, 2048] logits stay in a core's cache, which is 1.6 times as fast as [256, V]. Elsewhere the
# whole head at once, since XLA on GPUs copies a tile before it multiplies; 512 tokens keep the products above 300 FLOP
# a byte of the head, about what the fastest cards do.
TILES = {"cpu": Tile(256, 2048)}
WHOLE_HEAD = Tile(512, 2**31)


OfChunk = Callable[[jax.Array, Head, jax.Array], Any]


def token_nll(
    hidden_MD: Float[Array, "M D"],
    head: Head | HeadWithRows | WholeHead,
    targets_M: Int[Array, " M"],
    supervised_M: Bool[Array, " M"],
) -> Float[Array, " M"]:
    """-log softmax(head's logits)[target] in f32 nats where supervised, 0 elsewhere.

    Supervised tokens are moved together first, so the head's products are done for them alone (rounded up to a chunk).
    Differentiable in `hidden_MD`, and in what trains of the head.
    """
    if isinstance(head, WholeHead):
        return _whole_nll(hidden_MD, head, targets_M, supervised_M)
    if isinstance(head, HeadWithRows):
        return _nll_with_rows(hidden_MD, head, targets_M, supervised_M)
    return _frozen_nll(hidden_MD, head, targets_M, supervised_M)


def _nll_with_rows(hidden_MD, head: HeadWithRows, targets_M, supervised_M):
    """log(sum over frozen rows + sum over rows that train) - l_target, whichever of the two the target is in."""
    hot_MN = head.hot(targets_M)
    vocabulary = head.frozen.weight_VD.shape[0]
    in_frozen_M = jnp.where(jnp.any(hot_MN, axis=1), vocabulary, targets_M)  # out of range: none of the frozen rows
    lse_M, target_M = _frozen_sums(hidden_MD, head.frozen, in_frozen_M, supervised_M)
    own_MN = head.own_logits(hidden_MD)
    target_M += jnp.sum(jnp.where(hot_MN, own_MN, 0.0), axis=1)
    nll_M = jnp.logaddexp(lse_M, jax.nn.logsumexp(own_MN, axis=1)) - target_M
    return jnp.where(supervised_M, nll_M, 0.0)


@jax.custom_vjp
def _frozen_nll(hidden_MD, head: Head, targets_M, supervised_M):
    """The gradient by `hidden_MD` is made while the logits exist, not from logits made again."""
    return _in_chunks(_nll_of_chunk, hidden_MD, head, targets_M, supervised_M)


@jax.custom_vjp
def _frozen_sums(hidden_MD, head: Head, targets_M, supervised_M):
    """(log-sum-exp, the target's logit: 0 where the target is out of range), both 0 where not supervised."""
    return _in_chunks(_sums_of_chunk, hidden_MD, head, targets_M, supervised_M)[:2]


@jax.custom_vjp
def _whole_nll(hidden_MD, head: WholeHead, targets_M, supervised_M):
    """The gradient by the head is made from logits made again, chunk by chunk, and summed in f32."""
    return _in_chunks(_nll_of_chunk, hidden_MD, head.cast(hidden_MD.dtype), targets_M, supervised_M)


def tile_of(platform: str, tokens: int, vocabulary: int) -> Tile:
    """The tile of a platform, no larger than there is work."""
    tile = TILES.get(platform, WHOLE_HEAD)
    return Tile(min(tile.tokens, tokens), min(tile.rows, vocabulary))


class _Running(NamedTuple):
    """Over the tiles so far: the largest logit, sum exp(l - largest), the target's logit, sum exp(l - largest) w."""

    largest_C: jax.Array
    sum_C: jax.Array
    target_C: jax.Array
    weighted_CD: jax.Array | None  # None where no gradient is wanted


def _nll_of_chunk(hidden_CD, head, targets_C):
    start = _start(hidden_CD, weighted=False)
    return _nll(_over_tiles(start, hidden_CD, head, targets_C))


def _nll_and_grad_of_chunk(hidden_CD, head, targets_C):
    run = _over_tiles(_start(hidden_CD, weighted=True), hidden_CD, head, targets_C)
    assert run.weighted_CD is not None
    mean_CD = run.weighted_CD / run.sum_C[:, None]
    target_CD = head.weight_VD[targets_C].astype(jnp.float32)
    slope_C = head.slope(run.target_C)
    if slope_C is not None:
        target_CD *= slope_C[:, None]
    return _nll(run), (mean_CD - target_CD).astype(hidden_CD.dtype)


def _sums_of_chunk(hidden_CD, head, targets_C):
    """(log-sum-exp, the target's logit, sum_v exp(l_v) w_v / sum_v exp(l_v))."""
    run = _over_tiles(_start(hidden_CD, weighted=True), hidden_CD, head, targets_C)
    assert run.weighted_CD is not None
    mean_CD = run.weighted_CD / run.sum_C[:, None]
    return jnp.log(run.sum_C) + run.largest_C, run.target_C, mean_CD.astype(hidden_CD.dtype)


def _nll(run: _Running) -> jax.Array:
    return jnp.log(run.sum_C) + run.largest_C - run.target_C


def _start(hidden_CD: jax.Array, *, weighted: bool) -> _Running:
    zeros_C = jnp.zeros(hidden_CD.shape[0], jnp.float32)
    return _Running(zeros_C - jnp.inf, zeros_C, zeros_C, jnp.zeros(hidden_CD.shape, jnp.float32) if weighted else None)


def _over_tiles(run: _Running, hidden_CD: jax.Array, head: Head, targets_C: jax.Array) -> _Running:
    """All of the head: whole tiles in a loop, then what is left."""
    vocabulary = head.weight_VD.shape[0]
    rows = tile_of(target_device().platform, hidden_CD.shape[0], vocabulary).rows
    if rows == vocabulary:
        return _add_tile(run, hidden_CD, head, targets_C)
    whole, rest = divmod(vocabulary, rows)

    def one(index, run):
        tile = head.rows(lambda x: jax.lax.dynamic_slice_in_dim(x, index * rows, rows))
        return _add_tile(run, hidden_CD, tile, targets_C - index * rows)

    run = jax.lax.fori_loop(0, whole, one, run)
    return _add_tile(run, hidden_CD, head.rows(lambda x: x[-rest:]), targets_C - whole * rows) if rest else run


def _add_tile(run: _Running, hidden_CD: jax.Array, tile: Head, place_C: jax.Array) -> _Running:
    """One tile more; `place_C` is the target's row in the tile, out of range where it lies in another."""
    logits_CW = tile.logits(hidden_CD)
    rows = logits_CW.shape[1]
    largest_C = jnp.maximum(run.largest_C, jnp.max(logits_CW, axis=-1))
    exp_CW = jnp.exp(logits_CW - largest_C[:, None])
    shrink_C = jnp.exp(run.largest_C - largest_C)
    at_place_C = jnp.take_along_axis(logits_CW, jnp.clip(place_C, 0, rows - 1)[:, None], axis=-1)[:, 0]
    weighted_CD = run.weighted_CD
    if weighted_CD is not None:
        slope_CW = tile.slope(logits_CW)
        factors_CW = exp_CW if slope_CW is None else exp_CW * slope_CW
        weighted_CD = weighted_CD * shrink_C[:, None] + dot_nn(factors_CW.astype(hidden_CD.dtype), tile.weight_VD)
    return _Running(
        largest_C=largest_C,
        sum_C=run.sum_C * shrink_C + jnp.sum(exp_CW, axis=-1),
        target_C=jnp.where((place_C >= 0) & (place_C < rows), at_place_C, run.target_C),
        weighted_CD=weighted_CD,
    )


def _in_chunks(of_chunk: OfChunk, hidden_MD, head: Head, targets_M, supervised_M):
    """of_chunk over the supervised tokens, its results put back in place, zero where not supervised."""
    m = hidden_MD.shape[0]
    size = tile_of(target_device().platform, m, head.weight_VD.shape[0]).tokens
    order_M = jnp.argsort(~supervised_M, stable=True)
    padding = -m % size
    chunks = jax.tree.map(
        lambda x: jnp.pad(x[order_M], ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]),
        (hidden_MD, targets_M, supervised_M),
    )
    shapes = jax.eval_shape(of_chunk, chunks[0][0], head, chunks[1][0])

    def one(_, chunk):
        hidden, targets, supervised = chunk
        results = jax.lax.cond(
            jnp.any(supervised),
            lambda: of_chunk(hidden, head, targets),
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )
        return None, jax.tree.map(lambda r: _masked(r, supervised), results)

    _, results = jax.lax.scan(one, None, chunks)
    place_M = jnp.argsort(order_M)
    return jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:])[place_M], results)


def _masked(result: jax.Array, supervised_C: jax.Array) -> jax.Array:
    keep = supervised_C.reshape(supervised_C.shape + (1,) * (result.ndim - 1))
    return jnp.where(keep, result, jnp.zeros((), result.dtype))


def _sums_forward(hidden_MD, head, targets_M, supervised_M):
    lse_M, target_M, mean_MD = _in_chunks(_sums_of_chunk, hidden_MD, head, targets_M, supervised_M)
    return (lse_M, target_M), (head, targets_M, target_M, mean_MD)


def _sums_backward(residuals, cotangents):
    head, targets_M, target_M, mean_MD = residuals
    d_lse_M, d_target_M = cotangents
    d_target_M = jnp.where(targets_M < head.weight_VD.shape[0], d_target_M, 0.0)
    slope_M = head.slope(target_M)
    if slope_M is not None:
        d_target_M *= slope_M
    target_MD = head.weight_VD.at[targets_M].get(mode="clip").astype(jnp.float32)
    d_MD = d_lse_M[:, None] * mean_MD.astype(jnp.float32) + d_target_M[:, None] * target_MD
    return d_MD.astype(mean_MD.dtype), None, None, None


_frozen_sums.defvjp(_sums_forward, _sums_backward)


def _whole_forward(hidden_MD, head, targets_M, supervised_M):
    frozen = head.cast(hidden_MD.dtype)
    lse_M, target_M, mean_MD = _in_chunks(_sums_of_chunk, hidden_MD, frozen, targets_M, supervised_M)
    return lse_M - target_M, (hidden_MD, head, targets_M, supervised_M, lse_M, target_M, mean_MD)


def _whole_backward(residuals, d_nll_M):
    hidden_MD, head, targets_M, supervised_M, lse_M, target_M, mean_MD = residuals
    frozen = head.cast(hidden_MD.dtype)
    d_nll_M = jnp.where(supervised_M, d_nll_M, 0.0)
    (d_hidden_MD, *_) = _sums_backward((frozen, targets_M, target_M, mean_MD), (d_nll_M, -d_nll_M))
    with jax.named_scope("whole_head"):
        d_VD = _by_head(hidden_MD, frozen, targets_M, lse_M, d_nll_M)
    return d_hidden_MD, WholeHead(d_VD.astype(head.weight_VD.dtype), head.softcap), None, None


def _by_head(hidden_MD, head: Head, targets_M, lse_M, d_nll_M) -> Float[Array, "V D"]:
    """sum over tokens of d_nll (softmax - onehot) slope times hidden state; chunks without supervision cost nothing."""
    m, size = hidden_MD.shape[0], tile_of(target_device().platform, hidden_MD.shape[0], head.weight_VD.shape[0]).tokens
    order_M = jnp.argsort(d_nll_M == 0, stable=True)
    chunks = jax.tree.map(
        lambda x: jnp.pad(x[order_M], ((0, -m % size),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]),
        (hidden_MD, targets_M, lse_M, d_nll_M),
    )

    def add(d_VD: jax.Array, chunk: tuple[jax.Array, ...]) -> jax.Array:
        hidden_CD, targets_C, lse_C, d_nll_C = chunk
        logits_CV = head.logits(hidden_CD)
        p_CV = jnp.exp(logits_CV - lse_C[:, None]).at[jnp.arange(size), targets_C].add(-1.0, mode="drop")
        slope_CV = head.slope(logits_CV)
        d_CV = p_CV * d_nll_C[:, None] * (1.0 if slope_CV is None else slope_CV)
        return d_VD + dot_tn(d_CV.astype(hidden_CD.dtype), hidden_CD)

    def one(d_VD, chunk):
        return jax.lax.cond(jnp.any(chunk[3] != 0), add, lambda d_VD, _: d_VD, d_VD, chunk), None

    return jax.lax.scan(one, jnp.zeros(head.weight_VD.shape, jnp.float32), chunks)[0]


_whole_nll.defvjp(_whole_forward, _whole_backward)


def _forward(hidden_MD, head, targets_M, supervised_M):
    nll_M, grad_MD = _in_chunks(_nll_and_grad_of_chunk, hidden_MD, head, targets_M, supervised_M)
    return nll_M, grad_MD


def _backward(grad_MD, d_nll_M):
    return (grad_MD.astype(jnp.float32) * d_nll_M[:, None]).astype(grad_MD.dtype), None, None, None


_frozen_nll.defvjp(_forward, _backward)
