"""The arithmetic of changes: exact sums, best products of a rank, TIES and DARE against loops over elements."""

import numpy as np
import pytest

from qlora_jax.io.export.adapter_arithmetic import (
    Product,
    add,
    drop,
    elected_mean,
    merge_sparse,
    trim,
    truncate,
    truncate_matrices,
)

RNG = np.random.default_rng(0)


def random_product(rank: int, lead: tuple[int, ...] = (2,), k: int = 20, n: int = 12) -> Product:
    return Product(RNG.normal(size=(*lead, k, rank)).astype("f4"), RNG.normal(size=(*lead, rank, n)).astype("f4"))


def dense(product: Product) -> np.ndarray:
    return product.a.astype("f8") @ product.b.astype("f8")


def best(changes: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(changes.astype("f8"), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def test_a_sum_is_exact():
    products = [random_product(3), random_product(5)]
    found = add(products, [0.5, -2.0])
    assert found.rank == 8
    np.testing.assert_allclose(dense(found), 0.5 * dense(products[0]) - 2 * dense(products[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (8, 8)])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_product_of_a_rank_is_the_closest(shape, rank):
    product = random_product(7, (2, 3), *shape)
    expected = best(dense(product), rank)
    norms = [np.sum(np.square(x)) for x in (expected, dense(product))]
    for found in (truncate(product, rank), truncate_matrices(dense(product).astype("f4"), rank)):
        assert found.product.rank == rank
        np.testing.assert_allclose(dense(found.product), expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose([found.kept, found.whole], norms, rtol=1e-5)
        of_a, of_b = np.linalg.norm(found.product.a, axis=-2), np.linalg.norm(found.product.b, axis=-1)
        np.testing.assert_allclose(of_a, of_b, rtol=1e-5)


def test_a_rank_that_is_large_enough_changes_nothing():
    product = random_product(7)
    for rank in (7, 50):
        found = truncate(product, rank)
        assert found.product is product and found.kept == found.whole
    wide = random_product(30)  # more columns than the matrix has
    np.testing.assert_allclose(dense(truncate(wide, 12).product), dense(wide), rtol=0, atol=1e-4)
    zero = Product(product.a, np.zeros_like(product.b))
    assert not np.any(truncate(zero, 2).product.b)


def test_ties_is_what_its_paper_computes():
    """Loops over elements: the largest of each change, the sign of their sum, the mean of those that have it."""
    changes, weights = RNG.normal(size=(3, 6, 5)).astype("f4"), [1.0, 0.5, 2.0]
    expected = np.zeros((6, 5))
    kept = np.zeros((3, 30))
    for one, change in enumerate(changes.reshape(3, 30)):
        for place in sorted(range(30), key=lambda place: -abs(change[place]))[:12]:
            kept[one, place] = change[place]
    for place in range(30):
        sign = 1 if sum(kept[:, place]) >= 0 else -1
        agreeing = [weight * value for weight, value in zip(weights, kept[:, place], strict=True) if value * sign > 0]
        expected.flat[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    found = elected_mean(trim(changes, 0.4, RNG), np.asarray(weights, "f4"))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_dare_keeps_elements_at_random_and_their_mean():
    changes, seeds, density = RNG.normal(size=(2, 8, 9)).astype("f4"), 2000, 0.3
    found = np.stack([drop(changes, density, np.random.default_rng(seed)) for seed in range(seeds)])
    kept = found != 0
    np.testing.assert_allclose(
        found[kept], np.broadcast_to(changes / np.float32(density), found.shape)[kept], rtol=1e-6
    )
    deviation = np.sqrt(density * (1 - density) / seeds)
    assert np.all(np.abs(kept.mean(0) - density) < 5 * deviation)
    np.testing.assert_array_equal(found[7], drop(changes, density, np.random.default_rng(7)))


@pytest.mark.parametrize(("method", "alike"), [("dare_linear", None), ("dare_ties", "ties")])
def test_a_density_of_one_drops_nothing(method, alike):
    products, weights = [random_product(3), random_product(5)], [0.25, 1.5]
    found = merge_sparse(products, weights, method, 1.0, RNG)
    expected = merge_sparse(products, weights, alike, 1.0, RNG) if alike else dense(add(products, weights))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
