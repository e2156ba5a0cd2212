"""Arithmetic of low-rank changes of weights: sums, TIES, DARE, and the closest product of a given rank.

Dimension key: M adapters, L layers and experts, K in, N out, R rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Product(NamedTuple):
    """The change A B of a weight, in f32."""

    a: Float[np.ndarray, "*L K R"]
    b: Float[np.ndarray, "*L R N"]

    @property
    def rank(self) -> int:
        """Columns of A."""
        return self.a.shape[-1]


class Truncated(NamedTuple):
    """The closest product of a rank, its squared Frobenius norm, and that of the whole change."""

    product: Product
    kept: float
    whole: float


def add(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """Returns the weighted sum of products exactly: their factors side by side."""
    scaled = [np.float32(weight) * product.b for product, weight in zip(products, weights, strict=True)]
    return Product(np.concatenate([product.a for product in products], axis=-1), np.concatenate(scaled, axis=-2))


def truncate(product: Product, rank: int) -> Truncated:
    """Returns the closest product of a rank, without forming [K, N]; the product itself if its rank is not larger."""
    q_a, r_a = np.linalg.qr(product.a.astype(np.float64))
    q_b, r_b = np.linalg.qr(np.swapaxes(product.b, -1, -2).astype(np.float64))
    core = r_a @ np.swapaxes(r_b, -1, -2)  # Q does not change distances
    if rank >= product.rank:
        whole = float(np.sum(np.square(core)))
        return Truncated(product, whole, whole)
    (a, b), kept, whole = truncate_matrices(core, rank)
    a, b = q_a @ a, b @ np.swapaxes(q_b, -1, -2)
    return Truncated(Product(a.astype(np.float32), b.astype(np.float32)), kept, whole)


def truncate_matrices(changes: Float[np.ndarray, "*L K N"], rank: int) -> Truncated:
    """Returns the closest products of a rank to matrices."""
    lead = changes.shape[:-2]
    pairs = [_closest(changes[place].astype(np.float64), rank) for place in np.ndindex(lead)]
    a, b = (np.stack(factors).reshape(*lead, *factors[0].shape) for factors in zip(*pairs, strict=True))
    kept = sum(float(np.sum(np.square(np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=1)))) for a, b in pairs)
    whole = float(np.sum(np.square(changes, dtype=np.float64)))
    return Truncated(Product(a.astype(np.float32), b.astype(np.float32)), kept, whole)


def _closest(change_KN: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of the closest product, with orthogonal columns and rows of equal norms.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix, of which only R are computed: that
    takes a tenth of the time of all.
    """
    if change_KN.shape[0] > change_KN.shape[1]:
        b_NR, a_RK = _closest(change_KN.T, rank)
        return a_RK.T, b_NR.T
    from scipy import linalg  # takes as long to import as JAX

    size = len(change_KN)
    _, a_KR = linalg.eigh(change_KN @ change_KN.T, subset_by_index=[max(0, size - rank), size - 1])
    b_RN = a_KR.T @ change_KN
    norms_R = np.linalg.norm(b_RN, axis=1)
    root_R = np.sqrt(np.where(norms_R > 0, norms_R, 1))
    return a_KR * root_R, b_RN / root_R[:, None]


def trim(changes_MKN: Float[np.ndarray, "M K N"], density: float, rng: np.random.Generator) -> np.ndarray:
    """Keeps the largest elements of each change, and sets the others to zero (TIES; Yadav et al., 2023)."""
    sizes = np.abs(changes_MKN).reshape(len(changes_MKN), -1)
    dropped = sizes.shape[1] - max(1, int(density * sizes.shape[1]))
    limits_M = np.partition(sizes, dropped, axis=1)[:, dropped]
    return np.where(np.abs(changes_MKN) >= limits_M[:, None, None], changes_MKN, np.float32(0))


def drop(changes_MKN: Float[np.ndarray, "M K N"], density: float, rng: np.random.Generator) -> np.ndarray:
    """Keeps random elements, divided by their share: the mean over seeds is the change (DARE; Yu et al., 2024)."""
    kept = rng.random(changes_MKN.shape, np.float32) < density
    return np.where(kept, changes_MKN / np.float32(density), np.float32(0))


def weighted_sum(changes_MKN: Float[np.ndarray, "M K N"], weights_M: np.ndarray) -> Float[np.ndarray, "K N"]:
    """Returns the weighted sum."""
    return np.tensordot(weights_M, changes_MKN, axes=1)


def elected_mean(changes_MKN: Float[np.ndarray, "M K N"], weights_M: np.ndarray) -> Float[np.ndarray, "K N"]:
    """Returns the mean of the weighted elements whose sign is that of the sum of all, before weights."""
    elected_KN = np.where(changes_MKN.sum(0) >= 0, np.float32(1), np.float32(-1))
    agrees_MKN = np.sign(changes_MKN) == elected_KN
    return weighted_sum(changes_MKN * agrees_MKN, weights_M) / np.maximum(agrees_MKN.sum(0), 1).astype(np.float32)


# Methods whose result does not have a low rank.
SPARSE = {
    "ties": (trim, elected_mean),
    "dare_linear": (drop, weighted_sum),
    "dare_ties": (drop, elected_mean),
}


def merge_sparse(
    products: Sequence[Product], weights: Sequence[float], method: str, density: float, rng: np.random.Generator
) -> Float[np.ndarray, "*L K N"]:
    """Returns the merge of changes by a method of SPARSE, one matrix at a time."""
    (sparsify, join), weights_M = SPARSE[method], np.asarray(weights, np.float32)
    merged = np.empty((*products[0].a.shape[:-1], products[0].b.shape[-1]), np.float32)
    for place in np.ndindex(merged.shape[:-2]):
        changes_MKN = np.stack([product.a[place] @ product.b[place] for product in products])
        merged[place] = join(sparsify(changes_MKN, density, rng), weights_M)
    return merged
