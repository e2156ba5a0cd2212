"""What a command sets up before its first array: the compilation cache, and the C library's allocator."""

import ctypes
import os
from pathlib import Path

import jax

CACHE_VARIABLE = "QLORA_JAX_CACHE"
_M_ARENA_MAX = -8  # of glibc's <malloc.h>


def cache_folder() -> Path:
    """Where files are kept between runs: $QLORA_JAX_CACHE, or ~/.cache/qlora_jax."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "qlora_jax")


def start() -> None:
    """Keeps compiled programs on disk, so that a second start does not compile; on Linux, one malloc arena.

    With an arena for each thread, freed activations stay with the thread that held them: more memory and page faults.
    A cache folder that jax was given otherwise is left alone.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_ARENA_MAX, 1)
