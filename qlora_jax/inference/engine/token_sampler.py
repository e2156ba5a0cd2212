"""Chooses the next token of each row of an engine, each row by its own settings.

A row's token depends on that row alone, to the bit. Masses are sums of integers, which are equal in any order. Barriers
keep the stages apart, so each compiles to the same arithmetic whichever others a program has. Filters find their
threshold by bisection, because sorting a vocabulary takes milliseconds on a CPU.

Dimension key: R rows, V vocabulary, W 32-bit words of a mask, C chunks of the vocabulary, L tokens per chunk, N tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from qlora_jax.inference.sampling_params import GREEDY, Sampling

LEAST_TEMPERATURE = 1e-6  # logits divided by less may overflow
_LIMB = 2.0**19  # a mass has two limbs of 19 bits, of which a uint32 can sum _CHUNK
_CHUNK = 4096
_NO_MASS = 27.0  # tokens further below the likeliest have no mass: exp(-27) < 2**-38
_BY_VALUE = 24  # steps that halve an interval of logits, before those that halve an interval of bits
_EVERY = np.int32(np.iinfo(np.int32).min)  # threshold that keeps every token


class Row(NamedTuple):
    """Everything but the logits that a row's next token depends on.

    Fields:
      sampling: settings.
      repeat: number of earlier requests that equal the row's; see Request.
      prompt: ids of the prompt.
      reply: ids of the reply so far.
      score_draw: see Request.
    """

    sampling: Sampling = GREEDY
    repeat: int = 0
    prompt: Sequence[int] = ()
    reply: Sequence[int] = ()
    score_draw: bool = False


class Draws(NamedTuple):
    """Rows that draw, and their random keys; the others are greedy."""

    drawn_R: Bool[Array, " R"]
    inverse_temperature_R: Float[Array, " R"]
    keys_R2: UInt32[Array, "R 2"]


class Filters(NamedTuple):
    """Filters of the rows that draw; log_min_p is -inf for rows without min-p."""

    top_k_R: Int32[Array, " R"]
    top_p_R: Float[Array, " R"]
    log_min_p_R: Float[Array, " R"]


class Penalties(NamedTuple):
    """Penalties of each row; see Sampling."""

    repetition_R: Float[Array, " R"]
    inverse_repetition_R: Float[Array, " R"]
    presence_R: Float[Array, " R"]
    frequency_R: Float[Array, " R"]


class RowSettings(NamedTuple):
    """Settings of all rows; None for a part that no row needs, which is then not computed.

    `score_factor_R` multiplies the logits of log-probabilities that are reported.
    """

    draws: Draws | None
    filters: Filters | None
    penalties: Penalties | None
    bias_RV: Float[Array, "R V"] | None
    score_factor_R: Float[Array, " R"] | None


class RowState(NamedTuple):
    """Arrays that change with every token.

    Fields:
      index_R: length of the reply so far.
      history_RV: twice the number of times that the reply has a token, plus 1 if the prompt has it; None without
        penalties.
    """

    index_R: Int32[Array, " R"]
    history_RV: Int32[Array, "R V"] | None


class Choice(NamedTuple):
    """The chosen tokens, and log-probabilities by the logits that nothing has changed, or None without them."""

    token_R: Int32[Array, " R"]
    log_p_R: Float[Array, " R"] | None = None
    likeliest_RN: Int32[Array, "R N"] | None = None
    likeliest_log_p_RN: Float[Array, "R N"] | None = None


def row_settings(rows: Sequence[Row], vocab: int) -> RowSettings:
    """Arrays of the rows' settings; to be rebuilt when other rows run."""
    settings = [row.sampling for row in rows]

    def floats(values: Sequence[float]) -> jax.Array:
        return jnp.asarray(np.array(values, np.float32))

    def of(name: str) -> jax.Array:
        return floats([getattr(each, name) for each in settings])

    draws = filters = penalties = bias_RV = None
    if any(each.temperature for each in settings):
        drawn = [each.temperature > 0 for each in settings]
        inverse = np.float32(1) / np.array([_divisor(each) for each in settings], np.float32)
        seeds_R = np.array([row.sampling.seed & 0xFFFFFFFF for row in rows], np.uint32)
        keys_R2 = _row_keys(seeds_R, np.array([row.repeat for row in rows], np.uint32))
        draws = Draws(jnp.asarray(np.array(drawn)), jnp.asarray(inverse), keys_R2)
    if any(each.temperature and (each.top_k or each.top_p < 1 or each.min_p) for each in settings):
        top_k = np.array([min(each.top_k, vocab) for each in settings], np.int32)
        log_min_p = [np.log(each.min_p) if each.min_p else -np.inf for each in settings]
        filters = Filters(jnp.asarray(top_k), of("top_p"), floats(log_min_p))
    if any(map(_penalizes, settings)):
        inverse_R = floats([1 / each.repetition_penalty for each in settings])
        penalties = Penalties(of("repetition_penalty"), inverse_R, of("presence_penalty"), of("frequency_penalty"))
    if any(each.logit_bias for each in settings):
        dense_RV = np.zeros((len(rows), vocab), np.float32)
        for row, each in enumerate(settings):
            for token, value in each.logit_bias:
                dense_RV[row, token] = value
        bias_RV = jnp.asarray(dense_RV)
    factor_R = None
    if any(row.score_draw and row.sampling.temperature not in (0, 1) for row in rows):
        factor_R = floats([1 / _divisor(row.sampling) if row.score_draw else 1 for row in rows])
    return RowSettings(draws, filters, penalties, bias_RV, factor_R)


def row_state(rows: Sequence[Row], vocab: int) -> RowState:
    """Arrays of the rows' replies so far; `sample_tokens` keeps them up to date until other rows run."""
    index_R = jnp.asarray(np.array([len(row.reply) for row in rows], np.int32))
    if not any(_penalizes(row.sampling) for row in rows):
        return RowState(index_R, None)
    history_RV = np.zeros((len(rows), vocab), np.int32)
    for counts_V, row in zip(history_RV, rows, strict=True):
        if _penalizes(row.sampling):
            np.add.at(counts_V, np.asarray(row.reply, np.int64), 2)
            counts_V[np.asarray(row.prompt, np.int64)] |= 1
    return RowState(index_R, jnp.asarray(history_RV))


def _divisor(sampling: Sampling) -> float:
    return max(sampling.temperature, LEAST_TEMPERATURE) if sampling.temperature else 1.0


def _penalizes(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


@jax.jit
def _row_keys(seeds_R: UInt32[Array, " R"], repeats_R: UInt32[Array, " R"]) -> UInt32[Array, "R 2"]:
    """Returns the random key of each row; of a seed, JAX reads the low 32 bits."""
    return jax.vmap(lambda seed, n: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), n)))(
        seeds_R, repeats_R
    )


@functools.partial(jax.jit, static_argnames="likeliest", donate_argnames="state")
def sample_tokens(
    logits_RV: Float[Array, "R V"],
    settings: RowSettings,
    state: RowState,
    mask_RW: Int32[Array, "R W"] | None = None,
    *,
    likeliest: int | None = None,
) -> tuple[Choice, RowState]:
    """Chooses the next token of each row, and adds it to the state, which is donated.

    Args:
      logits_RV: float32.
      mask_RW: has bit i of word w set if token 32 w + i is allowed; None: all tokens are.
      likeliest: number of likeliest tokens to report besides the log-probability of the chosen one; None: report
        neither.
    """
    scores_RV = _apart(apply_penalties(logits_RV, settings, state.history_RV))
    if mask_RW is not None:
        scores_RV = _apart(jnp.where(_unpacked(mask_RW, logits_RV.shape[1]), scores_RV, -jnp.inf))
    if settings.draws is not None:
        scores_RV = _with_noise(scores_RV, settings.draws, settings.filters, state.index_R)
    token_R = _first_largest(scores_RV)
    if settings.score_factor_R is not None:
        logits_RV = _apart(logits_RV * settings.score_factor_R[:, None])
    scored = () if likeliest is None else log_probabilities(logits_RV, token_R, likeliest)
    history_RV = state.history_RV
    if history_RV is not None:
        history_RV = history_RV.at[jnp.arange(token_R.size), token_R].add(2)
    return Choice(token_R, *scored), RowState(state.index_R + 1, history_RV)


_apart = jax.lax.optimization_barrier


def apply_penalties(
    logits_RV: Float[Array, "R V"], settings: RowSettings, history_RV: Int32[Array, "R V"] | None
) -> Float[Array, "R V"]:
    """Returns the logits after penalties and biases."""
    if settings.penalties is not None and history_RV is not None:
        repetition_R1, inverse_R1, presence_R1, frequency_R1 = (each_R[:, None] for each_R in settings.penalties)
        divided_RV = logits_RV * jnp.where(logits_RV < 0, repetition_R1, inverse_R1)
        logits_RV = _apart(jnp.where(history_RV > 0, divided_RV, logits_RV))
        count_RV = (history_RV >> 1).astype(jnp.float32)
        often_RV = _apart(frequency_R1 * count_RV)
        logits_RV = _apart(logits_RV - often_RV - jnp.where(count_RV > 0, presence_R1, 0))
    return logits_RV if settings.bias_RV is None else logits_RV + settings.bias_RV


def _unpacked(mask_RW: jax.Array, vocab: int) -> jax.Array:
    bits_RWB = (mask_RW[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    return bits_RWB.reshape(len(mask_RW), -1)[:, :vocab] == 1


def _with_noise(scores_RV: jax.Array, draws: Draws, filters: Filters | None, index_R: jax.Array) -> jax.Array:
    """Scores whose largest is a draw, in rows that draw."""
    keys_R = jax.random.wrap_key_data(draws.keys_R2)
    keys_R = jax.vmap(jax.random.fold_in)(keys_R, index_R)
    noise_RV = _apart(jax.vmap(lambda key: jax.random.gumbel(key, scores_RV.shape[1:]))(keys_R))
    divided_RV = _apart(scores_RV * draws.inverse_temperature_R[:, None])
    if filters is not None:
        divided_RV = _apart(jnp.where(top_k_top_p_min_p_mask(divided_RV, filters), divided_RV, -jnp.inf))
    return _apart(jnp.where(draws.drawn_R[:, None], noise_RV + divided_RV, scores_RV))


def top_k_top_p_min_p_mask(logits_RV: Float[Array, "R V"], filters: Filters) -> Bool[Array, "R V"]:
    """Returns which tokens all filters keep; equal logits are kept together.

    Args:
      logits_RV: divided by the temperature.
    """
    keys_RV, largest_R = _apart((_ordered(logits_RV), jnp.max(logits_RV, axis=-1)))
    finite_RV = jnp.where(logits_RV > -jnp.inf, keys_RV, np.int32(np.iinfo(np.int32).max))
    smallest_R, highest_R = jnp.min(finite_RV, axis=-1), jnp.max(keys_RV, axis=-1)
    by_count_R = _top_k(keys_RV, filters.top_k_R, smallest_R, highest_R)
    lowest_R = jnp.maximum(jnp.maximum(by_count_R, smallest_R), _ordered(largest_R - _NO_MASS))
    by_mass_R = jax.lax.cond(
        jnp.any(filters.top_p_R < 1),
        lambda: _top_p(logits_RV, keys_RV, filters.top_p_R, largest_R, lowest_R, highest_R),
        lambda: jnp.full_like(by_count_R, _EVERY),
    )
    threshold_R = jnp.maximum(jnp.maximum(by_count_R, by_mass_R), _ordered(largest_R + filters.log_min_p_R))
    return keys_RV >= threshold_R[:, None]


def _top_k(keys_RV: jax.Array, top_k_R: jax.Array, smallest_R: jax.Array, highest_R: jax.Array) -> jax.Array:
    """The key of the k-th largest logit of each row, or less if that keeps the same tokens."""

    def count(threshold_R: jax.Array) -> jax.Array:
        return jnp.sum(keys_RV >= threshold_R[:, None], axis=-1, dtype=jnp.int32).astype(jnp.float32)

    filters_R = top_k_R > 0
    ends = smallest_R, jnp.where(filters_R, highest_R + 1, smallest_R + 1)
    found_R = _bisect(ends, count, top_k_R.astype(jnp.float32), lambda low_R: jnp.ones_like(low_R, jnp.float32))
    return jnp.where(filters_R, found_R, _EVERY)


def _top_p(
    logits_RV: jax.Array,
    keys_RV: jax.Array,
    top_p_R: jax.Array,
    largest_R: jax.Array,
    lowest_R: jax.Array,
    highest_R: jax.Array,
) -> jax.Array:
    """The key of the smallest logit among the fewest largest whose mass is p of that of the keys from lowest_R on."""
    keys_RCL = _chunked(keys_RV, _EVERY)
    limbs = _apart(_limbs(logits_RV, largest_R))

    def mass(threshold_R: jax.Array) -> jax.Array:
        return _mass(limbs, keys_RCL >= threshold_R[:, None, None])

    def least(low_R: jax.Array) -> jax.Array:
        return jnp.exp(_value(low_R) - largest_R) * _LIMB**2

    filters_R = top_p_R < 1
    ends = lowest_R, jnp.where(filters_R, highest_R + 1, lowest_R + 1)
    found_R = _bisect(ends, mass, top_p_R * mass(lowest_R), least)
    return jnp.where(filters_R, found_R, _EVERY)


def _bisect(
    ends: tuple[jax.Array, jax.Array],
    total: Callable[[jax.Array], jax.Array],
    target_R: jax.Array,
    least: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The largest key of each row whose `total` reaches the target, or a smaller one that keeps the same tokens.

    Args:
      ends: keys, of which the first reaches the target or is the result, and the second doesn't reach it.
      total: sum over the tokens from a key on.
      least: lower bound of a token's part in that sum, for tokens from a key on.
    """

    def undecided(low_R: jax.Array, high_R: jax.Array, total_low_R: jax.Array, total_high_R: jax.Array) -> jax.Array:
        least_R = least(low_R)
        one_R = (total_low_R - total_high_R < 1.5 * least_R) & (least_R > 2.0**-20 * total_low_R)
        return (high_R - low_R != 1) & ~one_R

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        index, low_R, high_R, total_low_R, total_high_R = carry
        by_value_R = _ordered(_value(low_R) * 0.5 + _value(high_R - 1) * 0.5)
        width_R = jax.lax.bitcast_convert_type(high_R - low_R, jnp.uint32)
        middle_R = low_R + (width_R >> 1).astype(jnp.int32)
        middle_R = jnp.where(index < _BY_VALUE, jnp.clip(by_value_R, low_R + 1, high_R - 1), middle_R)
        total_R = total(middle_R)
        open_R = undecided(low_R, high_R, total_low_R, total_high_R)
        reaches_R = total_R >= target_R
        up_R, down_R = open_R & reaches_R, open_R & ~reaches_R
        return (
            index + 1,
            jnp.where(up_R, middle_R, low_R),
            jnp.where(down_R, middle_R, high_R),
            jnp.where(up_R, total_R, total_low_R),
            jnp.where(down_R, total_R, total_high_R),
        )

    def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:  # a row without a number is never decided
        return jnp.any(undecided(*carry[1:])) & (carry[0] < _BY_VALUE + 32)

    low_R, high_R = ends
    start = jnp.int32(0), low_R, high_R, total(low_R), jnp.zeros_like(target_R)
    return jax.lax.while_loop(goes_on, step, start)[1]


def _first_largest(scores_RV: jax.Array) -> jax.Array:
    """The index of each row's largest score, the first if several are equal; XLA's argmax is 6 times slower on CPUs."""
    keys_RV = _apart(_ordered(scores_RV))
    index_RV = jax.lax.broadcasted_iota(jnp.int32, keys_RV.shape, 1)
    at_RV = jnp.where(keys_RV == jnp.max(keys_RV, axis=-1, keepdims=True), index_RV, keys_RV.shape[1])
    return jnp.min(at_RV, axis=-1)


def log_probabilities(
    logits_RV: Float[Array, "R V"], token_R: Int32[Array, " R"], likeliest: int
) -> tuple[jax.Array, ...]:
    """Returns (log-probability of each row's token, ids of its likeliest tokens, their log-probabilities)."""
    largest_R1 = _apart(jnp.max(logits_RV, axis=-1, keepdims=True))
    limbs = _apart(_limbs(logits_RV, largest_R1[:, 0]))
    log_sum_R1 = _apart(jnp.log(_mass(limbs, jnp.full_like(limbs[0], True, jnp.bool)) / _LIMB**2))[:, None]
    own_R1 = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)
    values_RN, ids_RN = logits_RV[:, :0], jnp.zeros((len(logits_RV), 0), jnp.int32)
    if likeliest:  # a `top_k` takes milliseconds on a CPU
        values_RN, ids_RN = jax.lax.top_k(logits_RV, min(likeliest, logits_RV.shape[1]))
    return (own_R1 - largest_R1 - log_sum_R1)[:, 0], ids_RN, values_RN - largest_R1 - log_sum_R1


def _ordered(values: jax.Array) -> jax.Array:
    """Integers in the order of float32 values, equal for equal values."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _value(ordered: jax.Array) -> jax.Array:
    """The value of each integer of `_ordered`."""
    bits = jnp.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _chunked(values_RV: jax.Array, fill: np.int32 | np.uint32) -> jax.Array:
    rows, vocab = values_RV.shape
    padded_RV = jnp.pad(values_RV, ((0, 0), (0, -vocab % _CHUNK)), constant_values=fill)
    return padded_RV.reshape(rows, -1, _CHUNK)


def _limbs(logits_RV: jax.Array, largest_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(logit - largest) in fixed point, in units of 2**-19 and of 2**-38."""
    scaled_RV = jnp.exp(logits_RV - largest_R[:, None]) * _LIMB
    high_RV = jnp.floor(scaled_RV)
    low_RV = jnp.round((scaled_RV - high_RV) * _LIMB)
    high_RCL, low_RCL = (_chunked(limb_RV.astype(jnp.uint32), np.uint32(0)) for limb_RV in (high_RV, low_RV))
    return high_RCL, low_RCL


def _mass(limbs: tuple[jax.Array, jax.Array], kept_RCL: jax.Array) -> jax.Array:
    """The sum of the kept tokens' limbs in units of 2**-38, rounded to float32."""

    def total(limb_RCL: jax.Array) -> jax.Array:
        sums_RC = jnp.sum(jnp.where(kept_RCL, limb_RCL, 0), axis=-1, dtype=jnp.uint32)
        high_R, low_R = (jnp.sum(part_RC, axis=-1, dtype=jnp.uint32) for part_RC in (sums_RC >> 16, sums_RC & 0xFFFF))
        return high_R.astype(jnp.float32) * 2.0**16 + low_R.astype(jnp.float32)

    return total(limbs[0]) * _LIMB + total(limbs[1])
