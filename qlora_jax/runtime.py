"""Prepares the process for a command before its first array, and frees memory after its start."""

import ctypes
import gc
import mmap
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax

CACHE_VARIABLE = "QLORA_JAX_CACHE"
# The fraction of a GPU's memory that jax allocates at its start, 0.75 by default; the second name is deprecated.
MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
USABLE_MEMORY = "0.95"
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # NVIDIA's driver on Linux, and under WSL


def cache_folder() -> Path:
    """The folder of files that runs share: $QLORA_JAX_CACHE, or ~/.cache/qlora_jax."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "qlora_jax")


def start() -> None:
    """Caches compiled programs on disk, raises jax's share of GPU memory, and skips a search for CUDA without a driver.

    A cache folder or memory fraction that the user has set is not changed.
    """
    if not any(Path(path).exists() for path in DRIVERS):
        # With jax's CUDA plugin (extra gpu-compile) and no driver, jax would print a traceback and use the CPU.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not any(name in os.environ for name in MEMORY_FRACTIONS):
        os.environ[MEMORY_FRACTIONS[0]] = USABLE_MEMORY
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def skip_unusable_plugins() -> None:
    """Makes jax load no CUDA plugin, which takes 80 MB, if JAX_PLATFORMS names no GPU, or without a driver.

    Such a process cannot compile for absent cards. Does nothing after the first use of a device.
    """
    wanted = (jax.config.jax_platforms or "cuda").split(",")
    if not {"cuda", "gpu"}.isdisjoint(wanted) and any(Path(path).exists() for path in DRIVERS):
        return
    for name in ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"):
        plugin = types.ModuleType(name)
        plugin.__dict__["initialize"] = lambda: None  # jax calls it instead of the plugin's
        sys.modules.setdefault(name, plugin)


def give_memory_back() -> None:
    """Returns freed memory to the system if the C library is glibc, and on Linux the pages of jaxlib's code.

    A compilation leaves 200 MB of freed memory, and uses 80 MB of code that no step needs. Code that is needed again is
    read from the system's cache of files.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    for start, size in _code_of_jaxlib():
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _code_of_jaxlib() -> Iterator[tuple[int, int]]:
    """Yields (address, bytes) of mapped code, which nothing has written to, on Linux."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        addresses, permissions, *_, path = line.split(maxsplit=5)
        if permissions == "r-xp" and "/jaxlib/" in path:
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end - start


def settle() -> None:
    """Frees what a start leaves behind, and lets Python's collector ignore what stays, which takes it 0.2 s each time.

    Programs that were compiled so far are compiled again if they are needed.
    """
    jax.clear_caches()
    gc.collect()
    gc.freeze()
    gc.enable()
    give_memory_back()
