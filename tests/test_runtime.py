"""A command starts silently and without plugins that it cannot use, and returns memory that it no longer needs."""

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


CODE_AND_RESULT = """
import jax, jax.numpy as jnp
from qlora_jax import runtime

def code_mib():
    sizes, of_jaxlib = 0, False
    for line in open("/proc/self/smaps"):
        name, second, *_ = line.split()
        if not name.endswith(":"):
            of_jaxlib = second == "r-xp" and "/jaxlib/" in line
        elif of_jaxlib and name == "Rss:":
            sizes += int(second)
    return sizes / 1024

f = jax.jit(lambda x: jnp.tanh(x) @ x.T)
x = jnp.arange(12.0).reshape(3, 4)
first, before = f(x), code_mib()
runtime.give_memory_back()
print(before, code_mib(), bool((f(x) == first).all()))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="requires Linux")
def test_code_that_only_compiling_needs_is_returned():
    done = subprocess.run([sys.executable, "-c", CODE_AND_RESULT], capture_output=True, text=True, check=True)
    before, after, is_same = done.stdout.split()
    assert float(before) > 30 and float(after) < 5 and is_same == "True"
