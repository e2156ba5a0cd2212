"""The op on meshes of eight devices, against the same op on one; `test_sharded.py` runs this file with eight.

Every value is also compared with float64, so that a common error shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.shards import place
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.nf4_matmul.sharded import EVERYWHERE, column_parallel, row_parallel
from tests.pallas_kernels.nf4_matmul.collectives import largest_moved, moved
from tests.pallas_kernels.nf4_matmul.contract import weight
from tests.pallas_kernels.nf4_matmul.tolerances import OF_PARTS, UNFUSED, relative_error, tolerance

LAYERS = 3


def mesh_of(*sizes, names=("data", "model"), kind=AxisType.Auto):
    return jax.make_mesh(sizes, names[-len(sizes) :], axis_types=(kind,) * len(sizes))


def numbers(*shape, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def allowed(result, terms):
    return tolerance(result.dtype, terms, result.size, UNFUSED + OF_PARTS)


def check(product, cut, qt, x, *, mesh, rows=EVERYWHERE, layer=None, place_weights=True, compiled=True):
    """Computes values and dx of one product."""
    laid = place(qt, cut, mesh, "model") if place_weights else qt
    dense = dequantize_numpy(qt, np.float32).astype(np.float64)
    dense = dense if layer is None else dense[layer]
    dy = numbers(*x.shape[:-1], dense.shape[0], seed=2, dtype=x.dtype)

    def run(x, laid, dy):
        y, vjp = jax.vjp(lambda x: product(x, laid, layer, mesh, "model", rows), x)
        return y, *vjp(dy)

    y, dx = (jax.jit(run) if compiled else run)(x, laid, dy)
    assert y.dtype == dx.dtype == x.dtype
    n, k = dense.shape
    assert relative_error(y, np.asarray(x, np.float64) @ dense.T) <= allowed(y, k)
    assert relative_error(dx, np.asarray(dy, np.float64) @ dense) <= allowed(dx, n)
    one = nf4_matmul(x, qt, layer, implementation="reference")
    assert relative_error(y, np.asarray(one, np.float64)) <= allowed(y, k)


COLUMN = [("bnb", (64, 192)), ("split_k", (512, 192)), ("split_k", (512, 256)), ("flat", (64, 40))]
ROW = [("bnb", (64, 1536)), ("split_k", (64, 1024)), ("row_planar", (64, 1024))]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("layout", "shape"), COLUMN)
def test_column_parallel(layout, shape, dtype):
    check(column_parallel, "N", weight(shape, layout=layout), numbers(7, shape[1], dtype=dtype), mesh=mesh_of(8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("layout", "shape"), ROW)
def test_row_parallel(layout, shape, dtype):
    check(row_parallel, "K", weight(shape, layout=layout), numbers(7, shape[1], dtype=dtype), mesh=mesh_of(8))


@pytest.mark.parametrize("rows", [P(), P("data"), P("data", "model"), P(("data", "model")), P(None, "model")])
@pytest.mark.parametrize(
    ("product", "cut", "shape"),
    [(column_parallel, "N", (256, 192)), (row_parallel, "K", (64, 512))],
)
def test_rows_lie_over_the_mesh_too(product, cut, shape, rows):
    x = numbers(8, 4, shape[1])
    check(product, cut, weight(shape, layout="split_k"), x, mesh=mesh_of(2, 4), rows=rows)


@pytest.mark.parametrize(
    ("product", "cut", "shape"),
    [(column_parallel, "N", (512, 192)), (row_parallel, "K", (64, 1024))],
)
def test_stacks_and_unplaced_weights(product, cut, shape):
    layers = [weight(shape, layout="split_k", seed=i) for i in range(LAYERS)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    check(product, cut, stack, numbers(5, shape[1]), mesh=mesh_of(8), layer=2, place_weights=False, compiled=False)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_mesh_of_explicit_axes(compiled):
    mesh = mesh_of(8, kind=AxisType.Explicit)
    check(column_parallel, "N", weight((512, 192), layout="split_k"), numbers(8, 192), mesh=mesh, compiled=compiled)
    check(
        row_parallel,
        "K",
        weight((64, 1024), layout="split_k"),
        numbers(8, 1024),
        mesh=mesh,
        rows=P("model"),
        compiled=compiled,
    )


WIDTH, INNER, ROWS = 512, 1024, 8


def stacks(layout="split_k"):
    def stack(shape):
        layers = [weight(shape, layout=layout, seed=i) for i in range(LAYERS)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    return stack((INNER, WIDTH)), stack((WIDTH, INNER))


def loss(x, up, down, first, second):
    @jax.checkpoint
    def layer(x, index):
        return x + second(jnp.tanh(first(x, up, index)), down, index), None

    y = jax.lax.scan(layer, x, jnp.arange(LAYERS))[0].astype(jnp.float32)
    return jnp.sum(y * y)


def on(mesh, product, rows=EVERYWHERE):
    return lambda x, weights, layer: product(x, weights, layer, mesh, "model", rows)


@pytest.fixture(scope="module", params=["sums whole", "sums scattered"])
def step(request):
    """Compiles loss and gradient of scanned, recomputed layers for eight devices: (program, arguments, kind)."""
    mesh, (up, down), x = mesh_of(8), stacks(), numbers(ROWS, WIDTH)
    rows = P() if request.param == "sums whole" else P("model")
    products = on(mesh, column_parallel, rows), on(mesh, row_parallel, rows)
    x = jax.device_put(x, NamedSharding(mesh, rows))
    arguments = (x, place(up, "N", mesh, "model"), place(down, "K", mesh, "model"))
    compiled = jax.jit(jax.value_and_grad(lambda *given: loss(*given, *products))).lower(*arguments).compile()
    return compiled, arguments, request.param


def test_scanned_layers_are_those_of_one_device(step):
    compiled, arguments, _ = step
    value, dx = compiled(*arguments)
    expected, expected_dx = jax.value_and_grad(loss)(numbers(ROWS, WIDTH), *stacks(), nf4_matmul, nf4_matmul)
    assert abs(value - expected) <= 1e-5 * abs(expected)
    assert relative_error(dx, np.asarray(expected_dx, np.float64)) <= 2 * LAYERS * allowed(dx, INNER)


def test_what_crosses_are_rows_and_sums(step):
    compiled, _, which = step
    expected = {
        "sums whole": {("all-reduce", "f32")},
        "sums scattered": {("all-gather", "f32"), ("reduce-scatter", "f32")},
    }
    assert moved(compiled.as_text()) == expected[which]
    # Rows; a weight, or a device's part, is 64 times as large.
    assert largest_moved(compiled.as_text()) <= ROWS * INNER < WIDTH * INNER // 8


def test_the_check_of_what_crosses_can_fail():
    """Gathers an array of the size of a weight."""
    mesh = mesh_of(8)
    laid = jax.device_put(numbers(INNER, WIDTH), NamedSharding(mesh, P("model")))
    x = jax.device_put(numbers(INNER, WIDTH), NamedSharding(mesh, P()))
    text = jax.jit(lambda x, w: x + w * 2, out_shardings=NamedSharding(mesh, P())).lower(x, laid).compile().as_text()
    assert ("all-gather", "f32") in moved(text) and largest_moved(text) == INNER * WIDTH


def test_parts_are_summed_in_f32():
    mesh = mesh_of(8)
    qt = place(weight((64, 1024), layout="split_k"), "K", mesh, "model")
    run = jax.jit(lambda x: row_parallel(x, qt, None, mesh, "model"))
    text = run.lower(numbers(8, 1024, dtype=jnp.bfloat16)).as_text()
    (reduction,) = [line for line in text.split("stablehlo.all_reduce")[1:]]
    assert "tensor<f32>" in reduction.split("stablehlo.return")[0]


def test_between_forward_and_backward_the_weights_are_kept_as_given():
    mesh = mesh_of(8)
    qt = place(weight((64, 1024), layout="split_k"), "K", mesh, "model")
    _, vjp = jax.vjp(lambda x: row_parallel(x, qt, None, mesh, "model"), numbers(8, 1024))
    saved = [leaf for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.Array)]
    assert {id(leaf) for leaf in saved if leaf.ndim} <= {id(leaf) for leaf in jax.tree.leaves(qt)}


def test_a_mapped_axis_becomes_rows():
    mesh, qt, x = mesh_of(8), weight((512, 192), layout="split_k"), numbers(3, 8, 192)
    mapped = jax.vmap(lambda x: column_parallel(x, qt, None, mesh, "model"))(x)
    assert relative_error(mapped, np.asarray(nf4_matmul(x, qt), np.float64)) <= allowed(mapped, 192)
