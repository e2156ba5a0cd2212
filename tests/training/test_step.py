"""The training step on eight virtual devices against the step on one."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.aot.collectives import ALL_GATHER, read_collectives, totals
from pallas_kernels.aot.hlo import parse
from pallas_kernels.dense_matmul import dot_nt
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul import nf4_matmul
from qlora_jax.config import LoraArgs
from qlora_jax.models import decoder
from qlora_jax.models.partition import ModelParts, place_parts
from qlora_jax.nn import linear
from qlora_jax.sharding import FSDP, ROWS, axis_size, gathered, make_mesh, named
from qlora_jax.training.step import evaluation_loss, gradients
from tests.marks import EXHAUSTIVE
from tests.training.compiled_text import PASSES_ON, TO_READ
from tests.training.mesh_models import CUT_VOCABULARY, WHOLE_VOCABULARY, mesh_batch, mesh_config, mesh_parts

SHAPE = (2, 8, 64)
MESHES = [(1, 8), (2, 4), (8, 1)]
CASES = [
    (dtype, remat, mesh)
    for dtype in ("float32", "bfloat16")
    for remat in ("names", "full", "offload", "none")
    for mesh in MESHES
    if remat != "none" or mesh == (8, 1)  # `none` would keep every gathered layer, and is refused with fsdp
]


@functools.cache
def parts_of(vocabulary: int, dtype: str) -> ModelParts:
    return mesh_parts(mesh_config(vocabulary), dtype=dtype)


@functools.cache
def on_one_device(vocabulary: int, dtype: str, remat: str):
    return gradients(parts_of(vocabulary, dtype), mesh_batch(mesh_config(vocabulary), SHAPE), None, remat=remat)


def arguments(vocabulary: int, dtype: str, remat: str, sizes: tuple[int, int]):
    mesh = make_mesh(*sizes)
    rows = named(mesh, jax.sharding.PartitionSpec(None, ROWS))
    batch = jax.device_put(mesh_batch(mesh_config(vocabulary), SHAPE), rows)
    return (place_parts(parts_of(vocabulary, dtype), mesh), batch, None), {"remat": remat, "mesh": mesh}


def on_mesh(vocabulary: int, dtype: str, remat: str, sizes: tuple[int, int]):
    args, kwargs = arguments(vocabulary, dtype, remat, sizes)
    return gradients(*args, **kwargs)


def relative(found: jax.Array, expected: jax.Array) -> float:
    found_, expected_ = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found_ - expected_) / np.linalg.norm(expected_))


@pytest.mark.parametrize(("dtype", "remat", "sizes"), CASES)
def test_losses_equal_one_device_to_the_bit(dtype, remat, sizes):
    expected_grads, expected = on_one_device(WHOLE_VOCABULARY, dtype, remat)
    grads, loss = on_mesh(WHOLE_VOCABULARY, dtype, remat, sizes)
    np.testing.assert_array_equal(loss.row_losses_AB, expected.row_losses_AB)
    assert float(loss.total) == float(expected.total) and float(loss.count) == float(expected.count)
    off = jax.tree.map(relative, grads, expected_grads)
    assert max(jax.tree.leaves(off)) < 1e-6, off


@pytest.mark.slow
def test_the_loss_of_an_evaluation_equals_one_device_to_the_bit():
    parts, mesh = parts_of(WHOLE_VOCABULARY, "float32"), make_mesh(2, 4)
    batch = jax.tree.map(lambda leaf: leaf[0], mesh_batch(mesh_config(WHOLE_VOCABULARY), SHAPE))
    expected = evaluation_loss(parts, batch)
    batch = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(ROWS)))
    np.testing.assert_array_equal(evaluation_loss(place_parts(parts, mesh), batch, mesh=mesh), expected)


def test_each_device_has_its_share():
    parts, mesh = parts_of(CUT_VOCABULARY, "float32"), make_mesh(1, 8)
    placed = place_parts(parts, mesh)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
    on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    uncut = [leaf.nbytes for leaf in jax.tree.leaves(placed) if leaf.is_fully_replicated]
    assert on_first == (whole - sum(uncut)) // 8 + sum(uncut)
    assert sum(uncut) < 0.02 * whole


@pytest.mark.parametrize(("sizes", "tied"), [((2, 4), False), pytest.param((1, 8), True, marks=EXHAUSTIVE)])
def test_tables_that_are_cut_change_losses_by_rounding_alone(sizes, tied):
    config = mesh_config(CUT_VOCABULARY, tie_word_embeddings=tied)
    lora = LoraArgs(rank=16, target_modules=["q_proj", "down_proj"])
    parts, batch, mesh = mesh_parts(config, lora=lora), mesh_batch(config, SHAPE), make_mesh(*sizes)
    expected_grads, expected = gradients(parts, batch, None, remat="names")
    batch = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    grads, loss = gradients(place_parts(parts, mesh), batch, None, remat="names", mesh=mesh)
    np.testing.assert_allclose(loss.row_losses_AB, expected.row_losses_AB, rtol=1.4e-7)
    assert max(jax.tree.leaves(jax.tree.map(relative, grads, expected_grads))) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "remat", "sizes", "dropout"),
    [
        ("float32", "names", (2, 4), 0.0),
        *(
            pytest.param(*case, marks=EXHAUSTIVE)
            for case in [
                ("float32", "full", (1, 8), 0.3),
                ("float32", "none", (8, 1), 0.0),
                ("float32", "full", (2, 4), 0.0),
                ("bfloat16", "names", (2, 4), 0.3),
            ]
        ),
    ],
)
def test_dora_equals_one_device_and_exchanges_no_more_packed_bytes(dtype, remat, sizes, dropout):
    config = mesh_config(WHOLE_VOCABULARY)
    lora = LoraArgs(rank=16, method="dora", dropout=dropout, target_modules=["q_proj", "down_proj"])
    parts, mesh = mesh_parts(config, dtype=dtype, lora=lora), make_mesh(*sizes)
    batch, key = mesh_batch(config, SHAPE), jax.random.key(3) if dropout else None
    expected_grads, expected = gradients(parts, batch, key, remat=remat)
    placed = place_parts(parts, mesh)
    batch = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    compiled = gradients.lower(placed, batch, key, remat=remat, mesh=mesh).compile()
    grads, loss = compiled(placed, batch, key)
    np.testing.assert_array_equal(loss.row_losses_AB, expected.row_losses_AB)
    off = jax.tree.map(relative, grads, expected_grads)
    assert max(jax.tree.leaves(off)) < 1e-6, off
    assert problems_of(compiled, placed, sizes) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "sizes", "cut"),
    [
        (LoraArgs(method="oft", oft_block_size=32, target_modules=["q_proj", "down_proj"]), (4, 2), {"down_proj"}),
        pytest.param(LoraArgs(method="pfeiffer", rank=16), (2, 4), {"mlp"}, marks=pytest.mark.exhaustive),
    ],
)
def test_rotations_and_bottlenecks_that_are_cut_equal_one_device(lora, sizes, cut):
    config = mesh_config(WHOLE_VOCABULARY, intermediate_size=1024)
    parts, batch, mesh = mesh_parts(config, lora=lora), mesh_batch(config, SHAPE), make_mesh(*sizes)
    placed = place_parts(parts, mesh)
    on_devices = jax.tree.map(lambda leaf: not leaf.is_fully_replicated, placed.lora)
    assert {name.rpartition(".")[2] for name, leaves in on_devices.items() if any(leaves.values())} == cut
    expected_grads, expected = gradients(parts, batch, None, remat="names")
    batch = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    grads, loss = gradients(placed, batch, None, remat="names", mesh=mesh)
    np.testing.assert_array_equal(loss.row_losses_AB, expected.row_losses_AB)
    off = jax.tree.map(relative, grads, expected_grads)
    assert max(jax.tree.leaves(off)) < 1e-6, off


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "alpha"), [(0.3, None), (0.0, 5.0)])
def test_dropout_and_noise_do_not_depend_on_micro_batches_or_the_mesh(dropout, alpha):
    """1 x 16 rows on one device and 4 x 4 on four; other masks or noise would change each row by more than 1e-5."""
    config = mesh_config(WHOLE_VOCABULARY)
    lora = LoraArgs(rank=16, dropout=dropout, target_modules=["q_proj", "down_proj"])
    how = {"remat": "names", "neftune_noise_alpha": alpha}
    parts, mesh, key = mesh_parts(config, lora=lora), make_mesh(2, 2), jax.random.key(3)
    batch = mesh_batch(config, (1, 16, 32))
    expected_grads, expected = gradients(parts, batch, key, **how)
    _, other = gradients(parts, batch, jax.random.key(4), **how)
    assert np.min(np.abs(other.row_losses_AB / expected.row_losses_AB - 1)) > 1e-5
    four = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[2:]), batch)
    spread = jax.device_put(four, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    grads, loss = gradients(place_parts(parts, mesh), spread, key, mesh=mesh, **how)
    np.testing.assert_allclose(loss.row_losses_AB.ravel(), expected.row_losses_AB.ravel(), rtol=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(relative, grads, expected_grads))) < 2e-6


def packed_bytes(parts: ModelParts) -> int:
    """The bytes of all codes and 8-bit constants that are cut."""
    leaves = [leaf for leaf in jax.tree.leaves(parts.base) if leaf.dtype == jnp.uint8]
    return sum(leaf.nbytes for leaf in leaves if not leaf.is_fully_replicated)


def exchange_problems(sizes: tuple[int, int], remat: str) -> list[str]:
    """Lists exchanges of a compiled step other than packed weights, twice per micro-batch, and small float arrays."""
    args, kwargs = arguments(WHOLE_VOCABULARY, "float32", remat, sizes)
    jax.clear_caches()  # a broken copy is another program under the same name
    return problems_of(gradients.lower(*args, **kwargs).compile(), args[0], sizes)


def problems_of(compiled: jax.stages.Compiled, parts: ModelParts, sizes: tuple[int, int]) -> list[str]:
    """Lists the problems of the exchanges of one compiled step."""
    text = compiled.as_text()
    assert text is not None
    collectives = read_collectives(text)
    expected = 2 * SHAPE[0] * packed_bytes(parts) if sizes[1] > 1 else 0
    found = sum(total.nbytes for (_, dtype), total in totals(collectives).items() if dtype == "u8")
    problems = [] if found == expected else [f"u8: found {found} bytes, expected {expected}"]
    smallest = min(int(np.prod(weight.shape)) for weight in stacks(parts))
    large = [one for one in collectives if one.dtype != "u8" and one.elements >= smallest]
    problems += [f"{one.operation} of {one.dtype} {one.array.shape}: as large as a weight" for one in large]
    others = [one for one in collectives if one.dtype == "u8" and one.operation != ALL_GATHER]
    return problems + [f"{one.operation} of u8" for one in others]


def stacks(parts: ModelParts) -> list[QTensor]:
    leaves = jax.tree.leaves(parts.base, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, QTensor)]


@pytest.mark.parametrize(("sizes", "remat"), [((1, 8), "names"), ((1, 8), "full"), ((2, 4), "full"), ((8, 1), "names")])
def test_packed_weights_cross_twice_and_nothing_else_is_large(sizes, remat):
    assert exchange_problems(sizes, remat) == []


def gather_and_multiply(x_MK, weight: QTensor):
    return nf4_matmul(x_MK, gathered(weight), None)


def backward_in_the_op(residuals, dy_MN):
    """Gathers once dy is there, as an op does that knows nothing of its neighbors; XLA would merge equal gathers."""
    x_MK, weight = residuals
    weight, dy_MN = lax.optimization_barrier((weight, dy_MN))
    return jax.vjp(lambda x_MK: gather_and_multiply(x_MK, weight), x_MK)[1](dy_MN)[0], None


product_in_the_op = jax.custom_vjp(gather_and_multiply)
product_in_the_op.defvjp(
    lambda x_MK, weight: (gather_and_multiply(x_MK, weight), (jnp.zeros_like(x_MK), weight)), backward_in_the_op
)


def gathered_in_the_op(x_MK, weight, layer, fast):
    """A frozen product that gathers its own weight, forward and backward."""
    if not isinstance(weight, linear.OneLayer):
        return frozen_linear(x_MK, weight, layer, fast)
    return product_in_the_op(x_MK, weight.weight)


def dequantized_before_the_gather(x_MK, weight, layer, fast):
    """A frozen product whose weight crosses in f32; the parts are rows of the weight."""
    if not isinstance(weight, linear.OneLayer):
        return frozen_linear(x_MK, weight, layer, fast)
    w_NK = dequantize(gathered(weight.weight)).astype(x_MK.dtype)
    count = axis_size(make_mesh(1, 8), FSDP)
    rows = w_NK.shape[0] // count
    own = lax.dynamic_slice_in_dim(w_NK, lax.axis_index(FSDP) * rows, rows)
    return dot_nt(x_MK, lax.all_gather(own, FSDP, tiled=True), x_MK.dtype)


frozen_linear = linear.frozen_linear


def ungathered_layer(base, layer):
    """gather_layer, but the parts stay parts."""
    is_stack = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    return jax.tree.map(
        lambda leaf: linear.OneLayer(leaf.layer(layer)) if is_stack(leaf) else leaf, base, is_leaf=is_stack
    )


@pytest.mark.slow
@pytest.mark.parametrize("broken", [gathered_in_the_op, dequantized_before_the_gather])
def test_other_exchanges_are_noticed(monkeypatch, broken):
    monkeypatch.setattr(linear, "frozen_linear", broken)
    monkeypatch.setattr(decoder, "gather_layer", ungathered_layer)
    problems = exchange_problems((1, 8), "full")
    assert any("as large as a weight" in one or one.startswith("u8: found") for one in problems), problems


@pytest.mark.slow
def test_a_mesh_of_one_device_has_the_operations_of_a_step_without_a_mesh():
    def operations(kwargs) -> Counter[tuple[str, str]]:
        text = gradients.lower(*args, **kwargs).compile(TO_READ).as_text()
        instructions = [one for computation in parse(text)[0].values() for one in computation.values()]
        return Counter((one.op, one.type) for one in instructions if one.op not in PASSES_ON | {"copy", "constant"})

    args, kwargs = arguments(CUT_VOCABULARY, "float32", "names", (1, 1))
    assert operations(kwargs) == operations(kwargs | {"mesh": None})
