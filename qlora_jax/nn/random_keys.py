"""Keys of random draws: one for each name, and one for each row of a batch.

Dimension key: B rows of the batch.
"""

import zlib

import jax
from jaxtyping import Array, Int, Key


def named_key(key: jax.Array, name: str) -> jax.Array:
    """Folds `name` into a key, so that draws for one name do not depend on other draws."""
    return jax.random.fold_in(key, name_number(name))


def name_number(name: str) -> int:
    """Returns the number by which `name` is folded into keys."""
    return zlib.crc32(name.encode())


def fold_in_rows(key: Key[Array, ""], rows_B: Int[Array, " B"]) -> Key[Array, " B"]:
    """Returns a key for each row, which depends only on `key` and the row's number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)


def fold_in_each(keys_B: Key[Array, " B"], data: jax.typing.ArrayLike) -> Key[Array, " B"]:
    """Folds the same number into the key of each row."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys_B)
