"""Builds the C++ handlers for this machine's processor: python -m pallas_kernels.native.build

Needs a C++17 compiler ($CXX, else c++, g++ or clang++) and a processor with AVX-512, or AVX2 and FMA. They are
optional: without them dequantization and decoding on a CPU are done in plain JAX, several times slower.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from pallas_kernels.native.library import SOURCES, library_path

COMPILERS = ("c++", "g++", "clang++")
# No contraction: double-quantized constants are rounded twice, as bitsandbytes rounds them.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")


def find_compiler() -> str:
    """The C++ compiler to use.

    Raises:
      ValueError: there is none.
    """
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise ValueError(f"no C++ compiler found (tried {', '.join(wanted)}): install one, or set CXX to its path")


def build() -> Path:
    """The library, built where it has not been.

    Raises:
      ValueError: no compiler, or it refuses; what it said.
    """
    path = library_path()
    if path.exists():
        return path
    command = [find_compiler(), *FLAGS, "-isystem", jax.ffi.include_dir(), *map(str, SOURCES)]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command)}\nended with status {done.returncode}:\n{_errors(done.stderr)}")
        built.replace(path)  # whole or not at all: another process may be loading it
    return path


def _errors(said: str) -> str:
    """The first errors of what a compiler said, templates cut short."""
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()
    return "\n".join(line[:300] for line in lines[:5])


def main() -> int:
    """Builds, and says where to or why not."""
    try:
        print(f"built: {build().name}")
    except (ValueError, OSError) as error:
        print(f"not built, plain JAX is used instead: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
