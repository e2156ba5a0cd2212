"""If compiling for absent cards is impossible, every use raises an error with the reason and the fix."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.aot import processes, toolchain

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def versions(monkeypatch):
    """Sets the package versions that toolchain reads; a missing key is a package that is not installed."""
    found = dict.fromkeys(toolchain.PACKAGES, "0.12.0") | {"jaxlib": "0.12.0"}
    monkeypatch.setattr(toolchain, "_version", found.get)
    return found


def test_missing_packages_are_named_with_the_command_that_installs_them(versions):
    del versions["nvidia-cuda-nvcc"], versions["cramjam"]
    problem = aot.problem()
    assert problem is not None
    assert "packages missing: nvidia-cuda-nvcc, cramjam." in problem
    assert "bash scripts/setup_gpu_compile.sh" in problem
    assert 'pip install "qlora-jax[gpu-compile]"' in problem


def test_a_plugin_of_another_release_is_named(versions):
    versions["jax-cuda13-plugin"] = "0.11.2"
    assert "jax-cuda13-plugin 0.11.2 requires jaxlib 0.11.2 (found 0.12.0)" in str(aot.problem())


def test_compile_for_raises_what_problem_says(versions):
    del versions["cramjam"]
    with pytest.raises(aot.CompilerUnavailableError, match=r"packages missing: cramjam. Install them"):
        aot.compile_for("a100", jnp.tanh, jax.ShapeDtypeStruct((8,), jnp.float32))


def test_a_wheel_without_its_program_is_named():
    with pytest.raises(aot.CompilerUnavailableError, match="package numpy has no program nvdisasm"):
        toolchain.tool("numpy", "nvdisasm")


def test_a_compiler_that_dies_is_an_error_and_the_next_call_has_a_new_one(compile_for):
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    compile_for("a100", jnp.tanh, x)
    process = processes._compiler("sm_80").process
    assert process is not None
    process.kill()
    process.wait()  # now writing fails, and closing the pipe fails again with what is left in its buffer
    with pytest.raises(aot.CompilerCrashedError, match="compiler for sm_80 ended with exit code -9"):
        compile_for("a100", jnp.tanh, x)
    assert compile_for("a100", jnp.tanh, x).fits


PLAIN_THEN_KERNEL = """
import jax, jax.numpy as jnp
from pallas_kernels import aot
from pallas_kernels.nf4_matmul import nf4_matmul
from pallas_kernels.kernel_report import abstract_weight
x = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
aot.compile_for("a6000", jnp.tanh, x)
compiled = aot.compile_for("a6000", nf4_matmul, x, abstract_weight((256, 256), "split_k"))
print(compiled.tensor_core_instructions)
"""


def test_a_kernel_compiles_after_a_program_that_has_none(compile_for):
    """Runs in a process that had not imported Mosaic when its compiler started."""
    command = [sys.executable, "-c", PLAIN_THEN_KERNEL]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0


def test_what_the_compiler_refuses_is_jaxs_own_error(compile_for):
    with pytest.raises(jax.errors.JaxRuntimeError, match="no custom call of this name"):
        call = jax.ffi.ffi_call("no custom call of this name", jax.ShapeDtypeStruct((8,), jnp.float32))
        compile_for("a100", lambda x: call(x), jax.ShapeDtypeStruct((8,), jnp.float32))


def run(code: str) -> subprocess.CompletedProcess[str]:
    cleared = {"JAX_PLATFORMS", toolchain.SKIP_CHECK}
    environment = {name: value for name, value in os.environ.items() if name not in cleared}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


needs_no_driver = pytest.mark.skipif(toolchain._has_driver(), reason="there is an NVIDIA driver here")


@needs_no_driver
def test_without_a_driver_and_JAX_PLATFORMS_the_variable_is_named(compile_for):
    done = run("from pallas_kernels.aot import problem; print(problem())")
    assert "no NVIDIA driver" in done.stdout
    assert "Set JAX_PLATFORMS=cpu" in done.stdout
    assert done.stderr == ""  # asking does not make JAX try the plugin, which prints a traceback


@needs_no_driver
@pytest.mark.parametrize(
    "first",
    ["import jax; jax.config.update('jax_platforms', 'cpu')", f"import os; os.environ['{toolchain.SKIP_CHECK}'] = '1'"],
)
def test_either_cure_works(compile_for, first):
    done = run(f"{first}\nfrom pallas_kernels.aot import problem\nprint(problem())")
    assert done.stdout == "None\n", done.stderr


@needs_no_driver
def test_a_plugin_that_was_refused_once_stays_away(compile_for):
    late = "import jax; jax.devices(); jax.config.update('jax_platforms', 'cpu')"
    done = run(f"{late}\nfrom pallas_kernels.aot import problem\nprint(problem())")
    assert "JAX has not loaded its CUDA plugin in this process" in done.stdout
