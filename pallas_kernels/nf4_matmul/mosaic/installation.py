"""Whether this installation can run the Mosaic kernels, known without importing Mosaic.

What the kernels need of jax is what they were compiled and interpreted with. What they need of the driver: it is handed
machine code, made by the ptxas beside jax from PTX of that jax's own version, so the driver's part is to load it.
NVIDIA promises that for every driver of the CUDA version's major, and sm_90a (TMA and wgmma: PTX ISA 8.0) came with
CUDA 12.0. jax with CUDA 13 wants a driver of CUDA 13.0 or later therefore, whatever the card.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

import jax

LEAST_JAX = (0, 11, 2)
LEAST_CUDA = 12000  # as CUDA counts: 1000 major + 10 minor
_VERSIONS = ("jax_cuda13_plugin._versions", "jax_cuda12_plugin._versions")


def problem() -> str | None:
    """What is too old for the kernels, what is needed, and what to do; None where nothing is.

    A driver is asked only where jax computes on a GPU: what is compiled elsewhere, for a card that is absent, runs with
    another machine's driver.
    """
    if jax.__version_info__ < LEAST_JAX:
        return f"needs jax {'.'.join(map(str, LEAST_JAX))} or newer, found {jax.__version__}: update jax"
    # In this order: where there is no driver, no backend of jax is started to ask.
    on_gpu = driver_is_here() and jax.default_backend() == "gpu"
    driver, runtime = cuda_versions() if on_gpu else (None, None)
    if driver is None or runtime is None:
        return None
    least = max(LEAST_CUDA, runtime // 1000 * 1000)
    if driver >= least:
        return None
    return f"needs a driver of CUDA {_name(least)} or newer, found one of CUDA {_name(driver)}: update the driver"


def driver_is_here() -> bool:
    """Whether NVIDIA's driver is loaded, on Linux or under WSL."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))


@functools.cache
def cuda_versions() -> tuple[int | None, int | None]:
    """(the newest CUDA that the driver knows, the CUDA that jax was built with), as its plugin reports them.

    None for what is not to be had: no plugin, or one of another maker.
    """
    versions = _plugin_versions()
    if versions is None:
        return None, None
    return versions.cuda_driver_get_version(), versions.cuda_runtime_build_version()


def _plugin_versions() -> Any:
    for name in _VERSIONS:
        try:
            return importlib.import_module(name)
        except ImportError:  # this plugin is not installed, or a library of CUDA is missing
            continue
    return None


def _name(version: int) -> str:
    """13000 -> 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"
