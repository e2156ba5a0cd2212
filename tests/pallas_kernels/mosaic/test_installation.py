"""A jax or a driver that is too old for the kernels: reported, and products use the reference."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Call
from pallas_kernels.mosaic import installation
from pallas_kernels.nf4_matmul import api
from qlora_jax.models import precision
from qlora_jax.training.display import banner
from qlora_jax.training.run import train
from tests.e2e.project import project
from tests.pallas_kernels.nf4_matmul.contract import weight
from tests.training.display.test_banner import session_of

CARDS = {
    "hopper": Device(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability=(9, 0)),
    "ampere": Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0)),
}


@pytest.fixture
def installed(monkeypatch):
    """Returns `installed(jax, driver, runtime)`, which pretends that jax computes on a GPU with these versions."""

    def fake(jax_version, driver, runtime=13000):
        monkeypatch.setattr(jax, "__version_info__", jax_version)
        monkeypatch.setattr(jax, "__version__", ".".join(map(str, jax_version)))
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(installation, "driver_is_here", lambda: True)
        monkeypatch.setattr(installation, "cuda_versions", lambda: (driver, runtime))

    return fake


OLD = [
    ((0, 10, 3), 13020, 13000, "requires jax 0.11.2 or newer (found 0.10.3). Update jax"),
    ((0, 11, 2), 12090, 13000, "requires a driver of CUDA 13.0 or newer (found one of CUDA 12.9). Update the driver"),
    ((0, 11, 2), 11080, 12090, "requires a driver of CUDA 12.0 or newer (found one of CUDA 11.8). Update the driver"),
]
NEW = [((0, 11, 2), 13000, 13000), ((0, 12, 0, 1), 13020, 13000), ((0, 11, 2), 12000, 12090), ((0, 11, 2), None, None)]


@pytest.mark.parametrize(("jax_version", "driver", "runtime", "problem"), OLD)
@pytest.mark.parametrize("kernel", CARDS)
def test_what_is_too_old_is_said_and_the_reference_runs(
    installed, monkeypatch, kernel, jax_version, driver, runtime, problem
):
    installed(jax_version, driver, runtime)
    call = Call.of("forward", 128, jnp.dtype(jnp.bfloat16), weight((64, 128), layout="split_k"))
    choice = api.choose_implementation(CARDS[kernel], call)
    assert choice.name == "reference" and choice.refusals[kernel] == problem
    assert api.choose_implementation(CARDS[kernel], call, kernel).name is None  # a named implementation is not replaced
    monkeypatch.setattr(banner, "target_device", lambda: CARDS[kernel])
    line = banner._matmuls.__wrapped__(session_of(weight((64, 128), layout="split_k")))
    assert line.startswith("reference; not skinny: ") and line.endswith(f"; not {kernel}: {problem}")


@pytest.mark.parametrize(("jax_version", "driver", "runtime"), NEW)
def test_what_is_new_enough_is_taken(installed, jax_version, driver, runtime):
    installed(jax_version, driver, runtime)
    assert installation.problem() is None


@pytest.mark.slow
def test_a_run_says_at_its_start_what_is_too_old(monkeypatch, tmp_path):
    """Runs training as on a card, except that a CPU computes, and returns its console output."""
    monkeypatch.setattr(installation, "LEAST_JAX", (99, 0))
    monkeypatch.setattr(banner, "target_device", lambda: CARDS["hopper"])
    monkeypatch.setattr(precision, "platform", lambda: "gpu")
    config = project(tmp_path, model=dict(compute_dtype="bfloat16"), train=dict(steps=1))
    shown = io.StringIO()
    train(config, Path(config.output), resume=False, oversized=False, console=Console(file=shown, width=1000))
    (line,) = [line for line in shown.getvalue().splitlines() if "matmuls" in line]
    assert line.split("matmuls")[1].split()[0] == "reference;"
    assert f"not hopper: requires jax 99.0 or newer (found {jax.__version__}). Update jax" in line


def test_another_machines_card_does_not_want_this_ones_driver(monkeypatch):
    monkeypatch.setattr(installation, "cuda_versions", lambda: pytest.fail("asked"))
    monkeypatch.setattr(installation, "driver_is_here", lambda: True)
    assert jax.default_backend() == "cpu" and installation.problem() is None


def test_the_version_of_cuda_that_jax_was_built_with_is_read_from_its_plugin():
    pytest.importorskip("jax_cuda13_plugin")
    assert installation._plugin_versions().cuda_runtime_build_version() // 1000 == 13
