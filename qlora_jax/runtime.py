"""What a command sets up before its first array, and memory given back to the system."""

import ctypes
import os
from pathlib import Path

import jax

CACHE_VARIABLE = "QLORA_JAX_CACHE"
# What jax takes of a GPU's memory at its start, 0.75 where nobody says; the second name is the deprecated one.
MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
USABLE_MEMORY = "0.95"
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # NVIDIA's driver on Linux, and under WSL


def cache_folder() -> Path:
    """Where files are kept between runs: $QLORA_JAX_CACHE, or ~/.cache/qlora_jax."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "qlora_jax")


def start() -> None:
    """Keeps compiled programs on disk, so that a second start does not compile; takes nearly all of a GPU's memory;
    spares jax a vain search for CUDA.

    A cache folder and a share of memory that jax was given otherwise are left alone.
    """
    if not any(Path(path).exists() for path in DRIVERS):
        # With jax's CUDA plugin (the extra gpu-compile) and no driver, jax prints a traceback and goes on with the CPU.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not any(name in os.environ for name in MEMORY_FRACTIONS):
        os.environ[MEMORY_FRACTIONS[0]] = USABLE_MEMORY
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def give_memory_back() -> None:
    """Returns freed memory to the system, where the C library is glibc: a compilation leaves 200 MB behind."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
