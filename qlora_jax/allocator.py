"""The C library's allocator, set before a command starts; imports nothing, so that it costs nothing."""

import os
import sys

# hugetlb=1: large blocks ask for huge pages. A training step takes its scratch from the system and gives it back; in
# pages of 4 KiB that is a tenth of the step. arena_max=1: with an arena for each thread, what it freed stays with it.
# mmap_threshold: from 4 MiB on a block is always mapped, and unmapped when it is freed; else the heap grows over the
# first steps by the holes between them, 50 to 75 MiB. From 8 MiB on, a rank of 64 takes 68 MiB more; from 2 MiB on, a
# step takes up to a quarter longer.
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=4194304"


def tune() -> None:
    """On Linux with glibc, starts the running command again with GLIBC_TUNABLES set, which is read at start only.

    The process keeps its id, and takes the time of an empty Python start. Where GLIBC_TUNABLES is set, nothing happens.
    """
    if "GLIBC_TUNABLES" in os.environ or not _has_glibc():
        return
    os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": TUNABLES})


def _has_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in os.confstr_names and bool(os.confstr("CS_GNU_LIBC_VERSION"))
