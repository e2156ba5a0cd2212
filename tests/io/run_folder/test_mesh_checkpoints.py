"""Checkpoints of a mesh of eight virtual devices: restored on any other, and opened on one device."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs, OptimArgs, write_config
from qlora_jax.io.digests import tree_digests
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Checkpoints, open_run
from qlora_jax.io.run_folder.checkpoint_reader import LORA, read_arrays, read_state
from qlora_jax.models.partition import lora_specs
from qlora_jax.optim import make_optimizer
from qlora_jax.optim.optax_chain import init_state
from qlora_jax.sharding import make_mesh
from qlora_jax.training.step import update
from tests.marks import EXHAUSTIVE
from tests.optim.mesh_lora import assert_same_bits, lora_of, on_mesh

OPTIMIZER = make_optimizer(OptimArgs(name="lion_8bit", max_grad_norm=0.3), 10)
STEPS = 2
OTHERS = [(2, 4), (1, 8), (2, 1), (1, 1)]


def started(mesh, seed: int = 0):
    """(parameters, state) at the start of a run."""
    lora = on_mesh(lora_of(seed), mesh)
    if mesh is None:
        return lora, OPTIMIZER.init(lora)
    return lora, init_state(OPTIMIZER, lora, lora_specs(lora, mesh), mesh)


def trained(lora, state, mesh, first: int):
    """(parameters, state) after STEPS more steps."""
    for step in range(first, first + STEPS):
        grads = on_mesh(lora_of(100 + step, 0.01), mesh)
        lora, state, _ = update(OPTIMIZER, lora, state, grads, mesh=mesh)
    return lora, state


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, tuple]:
    """(a run's folder, the parameters and state in its checkpoint), saved on eight devices."""
    folder, mesh = tmp_path_factory.mktemp("mesh"), make_mesh(2, 4)
    lora, state = trained(*started(mesh), mesh, 0)
    write_config(
        Config(model=ModelArgs(path="model"), data=DataArgs(train="rows.jsonl"), output="run"), folder / CONFIG_FILE
    )
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(STEPS, lora, state, {"step": STEPS, "fingerprint": "ab"})
    return folder, jax.device_get((lora, state))


@pytest.mark.parametrize("sizes", [(1, 4), None, *(pytest.param(sizes, marks=EXHAUSTIVE) for sizes in OTHERS)])
def test_a_checkpoint_of_eight_devices_is_restored_on_others(saved, sizes):
    folder, expected = saved
    mesh = None if sizes is None else make_mesh(*sizes)
    lora_like, state_like = started(mesh, seed=1)
    with Checkpoints(folder, keep=1) as checkpoints:
        lora, state, _ = checkpoints.restore(lora_like, state_like)
    assert_same_bits((lora, state), expected)
    assert_lie_alike((lora, state), (lora_like, state_like))


def test_going_on_from_a_checkpoint_equals_an_uninterrupted_run(saved):
    mesh = make_mesh(2, 4)
    with Checkpoints(saved[0], keep=1) as checkpoints:
        lora, state, _ = checkpoints.restore(*started(mesh, seed=1))
    whole = trained(*trained(*started(mesh), mesh, 0), mesh, STEPS)
    assert_same_bits(trained(lora, state, mesh, STEPS), whole)


def test_the_run_is_opened_on_one_device(saved):
    folder, (expected, _) = saved
    run = open_run(folder)
    assert_same_bits(run.lora, expected)
    assert {leaf.sharding.device_set == {jax.local_devices()[0]} for leaf in jax.tree.leaves(run.lora)} == {True}


def test_arrays_without_digests_are_read_to_one_device(saved):
    folder, (expected, _) = saved
    lora = read_arrays(folder / "checkpoints" / str(STEPS), LORA, None, None)
    assert_same_bits(lora, expected)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(lora)} == {1}


def test_digests_do_not_depend_on_the_mesh(saved):
    folder, (lora, state) = saved
    _, digests = read_state(folder / "checkpoints" / str(STEPS))
    assert digests["lora"] == tree_digests(lora) and digests["optimizer"] == tree_digests(state)
    for mesh in (make_mesh(1, 8), make_mesh(8, 1), None):
        assert tree_digests(on_mesh(jax.tree.map(jnp.asarray, lora), mesh)) == digests["lora"]


def test_one_devices_checkpoint_is_restored_on_a_mesh(saved, tmp_path):
    lora, state = jax.tree.map(jnp.asarray, saved[1])
    like = started(make_mesh(1, 8), seed=1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, lora, state, {"step": 1})
        restored = checkpoints.restore(*like)
    assert_same_bits((restored.lora, restored.optimizer_state), (lora, state))
    assert_lie_alike((restored.lora, restored.optimizer_state), like)


def assert_lie_alike(found, expected) -> None:
    """Checks that two trees lie on the same devices, cut alike."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
