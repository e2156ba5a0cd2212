"""A command starts silently, even if jax's CUDA plugin finds no driver; a server does not load that plugin."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax import runtime


@pytest.mark.skipif(any(Path(path).exists() for path in runtime.DRIVERS), reason="this machine has an NVIDIA driver")
def test_a_start_on_a_machine_without_a_driver_is_quiet():
    code = "from qlora_jax import runtime; runtime.start(); import jax; print(jax.devices()[0].platform)"
    spared = {"JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"}
    environment = {key: value for key, value in os.environ.items() if key not in spared}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu"]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or not Path("/proc/self/maps").exists(),
    reason="requires a plugin of jax, and Linux",
)
@pytest.mark.parametrize("skipped", [True, False])
def test_a_plugin_that_cannot_be_used_is_not_loaded(skipped):
    code = "from qlora_jax import runtime\n" + "runtime.skip_unusable_plugins()\n" * skipped
    code += "import jax\nprint(jax.devices()[0].platform, 'xla_cuda_plugin.so' in open('/proc/self/maps').read())"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", str(not skipped)] and done.stderr == ""
