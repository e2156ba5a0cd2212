"""Digests of arrays and JSON values, by which a reader knows that they are the ones that were written.

The digest of an array composes from the digests of its strips: ranges of STRIP_BYTES bytes of the whole array in C
order, the last one shorter. It therefore does not depend on how many devices or processes hold the array: each process
hashes the strips that it holds, and one process combines them.

The hash is XXH3 with 128 bits. It finds damage, not changes by somebody who also writes new digests.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from jaxtyping import ArrayLike, PyTree

STRIP_BYTES = 4 * 2**20  # the digests on disk depend on it


class ArrayDigest(TypedDict):
    """The digest of an array, with its type."""

    dtype: str
    shape: list[int]
    xxh3_128: str


def strips(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the strips of an array as bytes (uint8), without a copy if the array is contiguous."""
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, STRIP_BYTES):
        yield flat[start : start + STRIP_BYTES]


def strip_digest(strip: np.ndarray) -> bytes:
    """Returns the digest of one strip."""
    return xxhash.xxh3_128_digest(strip)


def combine(dtype: np.dtype, shape: Iterable[int], digests: Iterable[bytes]) -> ArrayDigest:
    """Returns the digest of an array from the digests of all its strips in order."""
    lengths = [int(length) for length in shape]
    whole = xxhash.xxh3_128(json.dumps([dtype.name, lengths]).encode())
    for digest in digests:
        whole.update(digest)
    return ArrayDigest(dtype=dtype.name, shape=lengths, xxh3_128=whole.hexdigest())


def array_digest(values: ArrayLike) -> ArrayDigest:
    """Returns the digest of an array; all processes call this together for one that they hold parts of."""
    array = np.asarray(whole(values))
    return combine(array.dtype, array.shape, map(strip_digest, strips(array)))


def whole(values: ArrayLike) -> ArrayLike:
    """Returns an array whole on this process's devices, or as it is if this process can read all of it.

    All processes call this together for an array that they hold parts of.
    """
    if not isinstance(values, jax.Array) or values.is_fully_addressable or values.is_fully_replicated:
        return values
    return multihost_utils.process_allgather(values, tiled=True)


def tree_digests(tree: PyTree) -> dict[str, ArrayDigest]:
    """Returns {path: digest} of every array of a tree."""
    return {path: array_digest(leaf) for path, leaf in by_path(tree).items()}


def by_path(tree: PyTree) -> dict[str, Any]:
    """Returns {path: leaf} of a tree; a path is like `model.layers.mlp.up_proj/lora_a`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def json_digest(value: object) -> str:
    """Returns the digest of a JSON value; the order of keys and the layout of the text do not change it."""
    read_back = json.loads(json.dumps(value))  # tuples become lists, keys become text
    return xxhash.xxh3_128_hexdigest(json.dumps(read_back, sort_keys=True).encode())


def changes(found: Mapping[str, ArrayDigest], expected: Mapping[str, ArrayDigest]) -> list[str]:
    """Returns a description of each array that is missing, unexpected or differs; empty if all are as expected."""
    return [
        f"{name}: {_change(found.get(name), expected.get(name))}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]


def _change(found: ArrayDigest | None, expected: ArrayDigest | None) -> str:
    if found is None or expected is None:
        return "missing" if found is None else "not expected"
    kinds = [f"{digest['dtype']}{digest['shape']}" for digest in (found, expected)]
    return "other values than were saved" if kinds[0] == kinds[1] else f"found {kinds[0]}, expected {kinds[1]}"
