"""A command starts silently, even if jax's CUDA plugin finds no driver."""

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
