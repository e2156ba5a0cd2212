"""Configures the C library's allocator before a command starts; imports only the standard library, to be fast."""

import os
import sys

# hugetlb=1: large blocks use huge pages. A training step allocates and frees its scratch memory, which with pages of
# 4 KiB takes a tenth of the step. arena_max=1: per-thread arenas would each retain the memory that they freed.
# mmap_threshold: blocks of 4 MiB or more are mapped, and unmapped when freed. Otherwise holes between them grow the
# heap by 50 to 75 MiB in the first steps. A threshold of 8 MiB needs 68 MiB more at rank 64; with 2 MiB a step takes up
# to a quarter longer.
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=4194304"


def tune() -> None:
    """Restarts the running command with GLIBC_TUNABLES set, which glibc reads only when a process starts.

    The process id stays the same; the restart takes as long as an empty Python program. Does nothing without
    glibc, or if GLIBC_TUNABLES is set already.
    """
    if "GLIBC_TUNABLES" in os.environ or not _has_glibc():
        return
    os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": TUNABLES})


def _has_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in os.confstr_names and bool(os.confstr("CS_GNU_LIBC_VERSION"))
