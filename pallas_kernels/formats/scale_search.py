"""Searches for the scales of ggml's K-quants and of IQ4_NL.

The arithmetic is that of `make_qkx2_quants`, `make_qx_quants` and `quantize_row_iq4_nl_impl` in ggml. Sums have their
order: the first weights of all groups are added, then the second ones.

Dimension key: S groups of weights that share a scale, W weights of a group.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.devices import target_device
from pallas_kernels.formats.exact_steps import extreme, nearest, quotient, reciprocal, separate
from pallas_kernels.formats.ggml_blocks import IQ4_VALUES
from pallas_kernels.native.library import handler, problem

_SMALLEST = np.float32(1e-15)  # a group of smaller weights has scale 0


class Found(NamedTuple):
    """Result of a search, f32 [..., 1] per group.

    Attributes:
      scale: the weights are scale code - minimum.
      minimum: zero, or what is subtracted.
      inverse: the codes of the search are those nearest to inverse (x - offset); 0 of a group without a scale.
      offset: see `inverse`.
    """

    scale: jax.Array
    minimum: jax.Array
    inverse: jax.Array
    offset: jax.Array


def scale_search(x: jax.Array, ggml_type: str, number: int) -> Found:
    """Finds the scale of each group of weights, x f32 [..., W].

    The C++ loops give ggml's bits. XLA on CPUs flushes subnormal numbers, so groups of weights below 1e-6 may differ.

    Args:
      ggml_type: a key of SEARCHES.
      number: its number in ggml's enumeration.
    """
    groups = x.reshape(-1, x.shape[-1])
    plain = functools.partial(by_xla, ggml_type=ggml_type)
    if problem() is None:
        loops = functools.partial(_by_loops, number=number)
        found = jax.lax.platform_dependent(groups, cpu=loops, default=plain)
    else:
        found = plain(groups)
    return Found(*found.reshape(4, *x.shape[:-1], 1))


def _by_loops(x_SW: jax.Array, number: int) -> jax.Array:
    result = jax.ShapeDtypeStruct((4, x_SW.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(handler("scale_search"), result, vmap_method="sequential")
    return call(x_SW, ggml_type=np.int64(number))


@functools.partial(jax.jit, static_argnames="ggml_type")
def by_xla(x_SW: jax.Array, ggml_type: str) -> jax.Array:
    """Returns (scale, minimum, inverse, offset) of each group, f32 [4, S]."""
    return jnp.stack(SEARCHES[ggml_type](x_SW.T))


def _sums(x_WS: jax.Array, terms: Callable[[jax.Array], tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    """Returns the sums of terms(x_S) over the weights of each group, added in order."""
    zeros = tuple(jnp.zeros_like(x_WS[0]) for _ in jax.eval_shape(terms, x_WS[0]))

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(total + separate(term) for total, term in zip(sums, terms(x_WS[i]), strict=True))

    return jax.lax.fori_loop(0, len(x_WS), add, zeros, unroll=target_device().platform != "cpu")


def _affine(x_WS: jax.Array, largest: int, first: float, steps: int) -> tuple[jax.Array, ...]:
    """Fits codes 0 to `largest` by least squares; errors count sqrt(mean x^2) + |x|."""
    (squares,) = _sums(x_WS, lambda x: (x * x,))
    average = jnp.sqrt(squares / len(x_WS))

    def weight(x: jax.Array) -> jax.Array:
        return average + jnp.abs(x)

    sum_w, sum_x = _sums(x_WS, lambda x: (weight(x), weight(x) * x))
    lowest, highest = jnp.min(x_WS, axis=0), jnp.max(x_WS, axis=0)
    flat, lowest = highest == jnp.minimum(lowest, 0), jnp.minimum(lowest, 0)

    def code(x: jax.Array, inverse: jax.Array, offset: jax.Array) -> jax.Array:
        return nearest(inverse * (x - offset), 0, largest)

    def error(scale: jax.Array, minimum: jax.Array, inverse: jax.Array, offset: jax.Array) -> jax.Array:
        def term(x: jax.Array) -> tuple[jax.Array]:
            off = separate(scale * code(x, inverse, offset)) + minimum - x
            return (weight(x) * (off * off),)

        return _sums(x_WS, term)[0]

    def moments(x: jax.Array, inverse: jax.Array, offset: jax.Array) -> tuple[jax.Array, ...]:
        codes = code(x, inverse, offset)
        weighted = weight(x) * codes
        return weighted, weighted * codes, weighted * x

    def step(at: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, _, offset, _, _ = best
        inverse = numerators[at] / (highest - offset)
        sum_l, sum_l2, sum_xl = _sums(x_WS, functools.partial(moments, inverse=inverse, offset=offset))
        determinant = separate(sum_w * sum_l2) - separate(sum_l * sum_l)
        scale = (separate(sum_w * sum_xl) - separate(sum_x * sum_l)) / determinant
        minimum = (separate(sum_l2 * sum_x) - separate(sum_l * sum_xl)) / determinant
        scale = jnp.where(minimum > 0, sum_xl / sum_l2, scale)
        minimum = jnp.where(minimum > 0, 0, minimum)
        now = error(scale, minimum, inverse, offset)
        better = (determinant > 0) & (now < best[0])
        new = (now, scale, minimum, inverse, offset)
        return tuple(jnp.where(better, ours, theirs) for ours, theirs in zip(new, best, strict=True))

    numerators = jnp.asarray(
        [np.float32(first) + np.float32(0.1) * np.float32(at) + np.float32(largest) for at in range(steps + 1)]
    )
    inverse = largest / jnp.where(flat, 1, highest - lowest)
    scale = 1 / jnp.where(flat, 1, inverse)
    start = (error(scale, lowest, inverse, lowest), scale, lowest, inverse, lowest)
    _, scale, minimum, inverse, offset = jax.lax.fori_loop(0, steps + 1, step, start)
    return jnp.where(flat, 0, scale), -minimum, jnp.where(flat, 0, inverse), offset


def _symmetric(
    x_WS: jax.Array,
    first: Callable[[jax.Array], jax.Array],
    numerators: Sequence[np.float32],
    value: Callable[[jax.Array], jax.Array],
    weighted: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, ...]:
    """Fits values without a minimum; errors count x^2.

    Args:
      first: the weight of the largest magnitude -> the first inverse that is tried.
      numerators: each divided by that weight is another.
      value: inverse x -> the nearest code or value.
      weighted: (x^2, x, value) -> their product, rounded twice.
    """
    extreme_S = extreme(x_WS.T)[:, 0]
    flat = jnp.abs(extreme_S) < _SMALLEST
    divisor = jnp.where(flat, 1, extreme_S)

    def tried(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        def terms(x: jax.Array) -> tuple[jax.Array, ...]:
            codes, squares = value(inverse * x), x * x
            return weighted(squares, x, codes), squares * codes * codes

        sum_xl, sum_l2 = _sums(x_WS, terms)
        return sum_xl, sum_l2

    def step(at: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, scale, best_inverse = state
        inverse = jnp.asarray(numerators)[at] / divisor
        sum_xl, sum_l2 = tried(inverse)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        scale = jnp.where(better, sum_xl / sum_l2, scale)
        return jnp.where(better, scale * sum_xl, best), scale, jnp.where(better, inverse, best_inverse)

    inverse = first(divisor)
    sum_xl, sum_l2 = tried(inverse)
    scale = jnp.where(sum_l2 > 0, sum_xl / jnp.where(sum_l2 > 0, sum_l2, 1), 0)
    _, scale, inverse = jax.lax.fori_loop(0, len(numerators), step, (scale * sum_xl, scale, inverse))
    zero = jnp.zeros_like(scale)
    return jnp.where(flat, 0, scale), zero, jnp.where(flat, 0, inverse), zero


def iq4_nl_codes(values: jax.Array) -> jax.Array:
    """Returns the codes 0 to 15 of the nearest of IQ4_VALUES."""
    middles = (IQ4_VALUES[:-1] + IQ4_VALUES[1:]) / 2
    return sum(((values >= middle).astype(jnp.uint8) for middle in middles), start=jnp.uint8(0))


def _iq4_nl_value(values: jax.Array) -> jax.Array:
    return jnp.asarray(IQ4_VALUES).at[iq4_nl_codes(values)].get(mode="promise_in_bounds")


SEARCHES: dict[str, Callable[[jax.Array], tuple[jax.Array, ...]]] = {
    "Q4_K": functools.partial(_affine, largest=15, first=-1.0, steps=20),
    "Q5_K": functools.partial(_affine, largest=31, first=-0.5, steps=15),
    "Q6_K": functools.partial(
        _symmetric,
        first=lambda extreme: -32 / extreme,
        numerators=[-(np.float32(32) + np.float32(0.1) * np.float32(i)) for i in range(-9, 10) if i],
        value=functools.partial(nearest, lowest=-32, highest=31),
        weighted=lambda square, x, code: square * x * code,
    ),
    "IQ4_NL": functools.partial(
        _symmetric,
        first=lambda extreme: reciprocal(quotient(extreme, 127)),
        numerators=[np.float32(i - 127) for i in range(-7, 8)],
        value=_iq4_nl_value,
        weighted=lambda square, x, value: square * value * x,
    ),
}
