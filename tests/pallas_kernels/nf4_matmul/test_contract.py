"""Each implementation passes the contract; bad calls raise errors that name the arguments."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.devices import target_device
from pallas_kernels.nf4_matmul import IMPLEMENTATIONS, nf4_matmul
from pallas_kernels.nf4_matmul.api import INTEGER
from pallas_kernels.nf4_matmul.shapes import REDUCED
from tests.pallas_kernels.nf4_matmul import contract as contract
from tests.pallas_kernels.nf4_matmul import twins

# Every exact implementation that runs on this machine, with every layout that it supports. Products of integers have
# another definition, with which test_cpu.py compares them.
RUNS = [
    pytest.param(
        name, layout, marks=pytest.mark.skipif(bool(one.missing()), reason=f"implementation {name} {one.missing()}")
    )
    for name, one in IMPLEMENTATIONS.items()
    if name != INTEGER
    for layout in one.capabilities.layouts or ("bnb", "row_planar", "split_k")
    if one.capabilities.devices is None or set(one.capabilities.devices) & set(target_device().names)
]


@pytest.mark.parametrize(("implementation", "layout"), RUNS)
def test_values_and_input_gradients(implementation, layout):
    for case in contract.cases():
        contract.check(implementation, layout, *case)


AS_HELD = [run for run in RUNS if run.values in (("cpu", "row_planar"), ("reference", "split_k"))]


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "layout"), AS_HELD)
def test_every_reduced_shape(implementation, layout):
    for shape, rows, dtype in twins.covering(REDUCED, twins.ROWS, contract.DTYPES):
        contract.check(implementation, layout, rows, shape, dtype, "nf4", True)


@pytest.mark.parametrize(("implementation", "layout"), RUNS)
def test_stacks_and_transforms(implementation, layout):
    contract.check_stack(implementation, layout)


def test_a_flat_layout_is_taken_by_the_reference():
    contract.check("reference", "flat", 7, (24, 40), jnp.float32, "nf4", True)


def test_bad_calls_say_what_was_given():
    w = contract.weight((64, 128))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    with pytest.raises(ValueError, match=r"K=64.*\(64, 128\).*K=128"):
        nf4_matmul(jnp.zeros((2, 64)), w)
    with pytest.raises(ValueError, match=r"layer=None.*stack_shape=\(2,\)"):
        nf4_matmul(jnp.zeros((2, 128)), stack)
    with pytest.raises(ValueError, match=r"layer=0.*stack_shape=\(\)"):
        nf4_matmul(jnp.zeros((2, 128)), w, 0)
    with pytest.raises(ValueError, match=r"implementation='nope'.*reference"):
        nf4_matmul(jnp.zeros((2, 128)), w, implementation="nope")


def test_forward_mode_is_refused():
    w = contract.weight((64, 128))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: nf4_matmul(x, w), (jnp.zeros((2, 128)),), (jnp.ones((2, 128)),))
