"""Updates on a mesh of eight virtual devices against those of one device, to the bit given the norm."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.config import OptimArgs
from qlora_jax.models.partition import lora_specs
from qlora_jax.optim import make_optimizer
from qlora_jax.optim.optax_chain import OPTIMIZERS, init_state, state_specs
from qlora_jax.optim.updates import apply_updates, in_f32
from qlora_jax.sharding import cut_axis
from qlora_jax.training.step import update
from tests.marks import EXHAUSTIVE
from tests.optim.mesh_lora import CUT, assert_same_bits, lora_of, meshes, on_mesh

STEPS = 3


@functools.partial(jax.jit, static_argnums=0)
def update_with_norm(optimizer, params, state, grads, norm):
    """One device's update with a norm that is known."""
    given = optax.with_extra_args_support(optimizer)
    updates, state = given.update(in_f32(grads), state, params, norm=norm)
    return apply_updates(params, updates), state


ALWAYS = [("adamw_32bit", "float32", 0, 0.3), ("adamw_8bit", "float32", 1, 0.3)]
EVERY = [
    (name, dtype, mesh, clip)
    for name in OPTIMIZERS
    for dtype in ("float32", "bfloat16")
    for mesh in (0, 1, 2)
    for clip in (0.3, 0.0)
]


@pytest.mark.parametrize(
    ("name", "dtype", "mesh", "max_grad_norm"),
    [pytest.param(*case, marks=[] if case in ALWAYS else EXHAUSTIVE) for case in EVERY],
)
def test_given_the_norm_parameters_and_state_equal_those_of_one_device(name, dtype, mesh, max_grad_norm):
    mesh = meshes()[mesh]
    optimizer = make_optimizer(OptimArgs(name=name, max_grad_norm=max_grad_norm, weight_decay=0.1), 10)
    whole, whole_state = lora_of(0, dtype=dtype), optimizer.init(lora_of(0, dtype=dtype))
    lora = on_mesh(lora_of(0, dtype=dtype), mesh)
    specs = lora_specs(lora, mesh)
    state = init_state(optimizer, lora, specs, mesh)
    for step in range(STEPS):
        grads = lora_of(100 + step, 0.01, dtype)
        exact = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in jax.tree.leaves(grads)))
        lora, state, norm = update(optimizer, lora, state, on_mesh(grads, mesh), mesh=mesh)
        np.testing.assert_allclose(norm, exact, rtol=1e-6)
        whole, whole_state = update_with_norm(optimizer, whole, whole_state, grads, np.asarray(norm))
    assert jax.tree.structure(state) == jax.tree.structure(whole_state)
    assert_lie_as(state, state_specs(optimizer, lora, specs), mesh)
    assert_same_bits((lora, state), (whole, whole_state))


def test_state_is_in_8_bits_where_the_whole_tensor_is_large():
    mesh, lora = meshes()[0], lora_of(0)
    for name, moments in {"adamw_8bit": 2, "lion_8bit": 1}.items():
        optimizer = make_optimizer(OptimArgs(name=name), 10)
        state = init_state(optimizer, on_mesh(lora, mesh), lora_specs(lora, mesh), mesh)
        codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == np.uint8]
        assert len(codes) == moments * 4
        assert sum(cut_axis(leaf.sharding.spec) is not None for leaf in codes) == moments * 2
        assert min(leaf.addressable_shards[0].data[0].size for leaf in codes) < 4096


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_new_state_lies_where_its_parameters_do(name):
    mesh, optimizer = meshes()[1], make_optimizer(OptimArgs(name=name), 10)
    lora = on_mesh(lora_of(0), mesh)
    specs = lora_specs(lora, mesh)
    assert sum(cut_axis(spec) is not None for spec in jax.tree.leaves(specs, is_leaf=is_spec)) == CUT
    assert_lie_as(init_state(optimizer, lora, specs, mesh), state_specs(optimizer, lora, specs), mesh)


def assert_lie_as(tree, specs, mesh) -> None:
    """Checks that every array, a count too, lies on all devices of the mesh, and how it is cut."""
    leaves = jax.tree.leaves(tree)
    for leaf, spec in zip(leaves, jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in leaves)


def test_an_update_sends_the_sums_of_the_norm_and_nothing_else():
    mesh, optimizer = meshes()[0], make_optimizer(OptimArgs(name="lion_32bit"), 10)
    lora = on_mesh(lora_of(0), mesh)
    state = init_state(optimizer, lora, lora_specs(lora, mesh), mesh)
    text = update.lower(optimizer, lora, state, lora, mesh=mesh).compile().as_text()
    lines = [line for line in text.splitlines() if any(f" {name}" in line for name in COLLECTIVES)]
    assert len(lines) == 1 and "f32[8]" in lines[0], lines


COLLECTIVES = ("all-gather(", "all-reduce(", "all-to-all(", "reduce-scatter(", "collective-permute(")


def is_spec(leaf) -> bool:
    return isinstance(leaf, P)
