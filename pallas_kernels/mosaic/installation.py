"""Checks that this installation can run the Mosaic kernels; does not import Mosaic.

The kernels require the jax versions with which they were compiled and interpreted. The driver only has to load machine
code, which jax's ptxas makes from PTX of the same version. NVIDIA guarantees that for every driver of the same CUDA
major version, and sm_90a (TMA and wgmma: PTX ISA 8.0) came with CUDA 12.0. So jax with CUDA 13 requires a driver of
CUDA 13.0 or later, whatever the card.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType

import jax

LEAST_JAX = (0, 11, 2)
LEAST_CUDA = 12000  # CUDA's encoding: 1000 major + 10 minor
WRONG_MASKS = 12080, 12091  # CUDA 12.8, and 12.9 until its first update
_VERSIONS = ("jax_cuda13_plugin._versions", "jax_cuda12_plugin._versions")


def problem() -> str | None:
    """Returns what is too old for the kernels and how to fix it, or None.

    Checks the driver only if jax computes on a GPU: a program compiled for an absent card runs with another driver.
    """
    if jax.__version_info__ < LEAST_JAX:
        return f"requires jax {'.'.join(map(str, LEAST_JAX))} or newer (found {jax.__version__}). Update jax"
    driver, runtime = _versions_in_use()
    if driver is None or runtime is None:
        return None
    least = max(LEAST_CUDA, runtime // 1000 * 1000)
    if driver >= least:
        return None
    return f"requires a driver of CUDA {_name(least)} or newer (found one of CUDA {_name(driver)}). Update the driver"


def masks_problem() -> str | None:
    """Returns why this CUDA cannot be trusted with masks of wgmma kernels, and how to fix it, or None.

    JAX has a kernel that refuses causal masks for this range, because ptxas miscompiles them.
    """
    _, runtime = _versions_in_use()
    if runtime is None or not WRONG_MASKS[0] <= runtime < WRONG_MASKS[1]:
        return None
    return f"requires a jax without CUDA {_name(runtime)}, whose ptxas miscompiles masks. Install jax[cuda13]"


def _versions_in_use() -> tuple[int | None, int | None]:
    """Returns `cuda_versions` if jax computes on a GPU; without a driver, no jax backend is started."""
    on_gpu = driver_is_here() and jax.default_backend() == "gpu"
    return cuda_versions() if on_gpu else (None, None)


def driver_is_here() -> bool:
    """True if NVIDIA's driver is loaded, on Linux or under WSL."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))


@functools.cache
def cuda_versions() -> tuple[int | None, int | None]:
    """Returns (the newest CUDA that the driver supports, the CUDA that jax was built with), from jax's plugin.

    Both are None without a plugin, or with another vendor's.
    """
    versions = _plugin_versions()
    if versions is None:
        return None, None
    return versions.cuda_driver_get_version(), versions.cuda_runtime_build_version()


def _plugin_versions() -> ModuleType | None:
    for name in _VERSIONS:
        try:
            return importlib.import_module(name)
        except ImportError:  # the plugin is not installed, or a CUDA library is missing
            continue
    return None


def _name(version: int) -> str:
    """Formats 13000 as 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"
