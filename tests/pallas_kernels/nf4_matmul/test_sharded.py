"""The op on several devices: runs `eight_devices.py` with eight, and checks errors before any device is used."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.nf4_matmul.sharded import column_parallel, row_parallel
from tests.pallas_kernels.nf4_matmul.contract import weight

ROOT = Path(__file__).resolve().parents[3]
MESH = AbstractMesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)


@pytest.mark.slow
def test_on_eight_devices():
    """Runs in a separate process, because a backend's number of devices is fixed when it starts."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [*command, "tests/pallas_kernels/nf4_matmul/eight_devices.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as error:
        column_parallel(jnp.zeros((3, 64)), weight((66, 128)), None, MESH, "model", P("model"))
    told = str(error.value)
    assert "x has K=64" in told and "N=66 over 4 devices is 16.5 each" in told
    assert "x [3, 64] has an axis of 3" in told and "cut it into 4" in told


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (P("data", None), "name 2 leading axes, x [8, 512] has 1"),
        (P("tokens"), "the mesh has axes 'data', 'model', not ['tokens']"),
        (P(("model", "data")), "'model' must be the last mesh axis of its entry"),
    ],
)
def test_rows_that_can_not_lie_so_are_refused(rows, part):
    with pytest.raises(ValueError) as error:
        row_parallel(jnp.zeros((8, 512)), weight((64, 512)), None, MESH, "model", rows)
    assert part in str(error.value)


def test_a_layer_beyond_the_stack_is_refused():
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight((64, 512)))
    with pytest.raises(ValueError, match="layer=2 is out of range for a stack of 2 layers"):
        row_parallel(jnp.zeros((8, 512)), stack, 2, MESH, "model")
