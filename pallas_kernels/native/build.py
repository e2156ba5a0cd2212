"""Builds the C++ handlers for this machine's processor: python -m pallas_kernels.native.build

Requires a C++17 compiler ($CXX, else c++, g++ or clang++) and a processor with AVX-512, or AVX2 and FMA. The handlers
are optional: without them, CPUs dequantize and decode in plain JAX, several times slower.

The library's name has a hash of the processor, the jaxlib version and the sources, so it is never loaded elsewhere.
XLA's flag --xla_cpu_max_isa hides instruction sets from XLA and from the library.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

_HERE = Path(__file__).parent
SOURCES = tuple(_HERE / f"{name}_cpu.cc" for name in ("nf4", "ggml", "matmul_f32", "attention", "attention_f32"))
HEADERS = tuple(_HERE / f"{name}.h" for name in ("attention", "buffer", "floats", "parallel"))
# Value of --xla_cpu_max_isa -> what the compiler may use. Without the flag, or with another value: all that there is.
ARCHITECTURES = {"SSE4_2": "x86-64-v2", "AVX": "x86-64-v2", "AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
BUILD = "python -m pallas_kernels.native.build"
COMPILERS = ("c++", "g++", "clang++")
# No contraction: double-quantized constants are rounded twice, as in bitsandbytes.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC")


def _processor() -> str:
    """Returns the instruction sets of this machine's processor, from Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags.*$", cpuinfo.read_text(errors="replace"), re.MULTILINE) if cpuinfo.exists() else None
    return f"{platform.machine()} {found[0] if found else platform.processor()}"


def architecture() -> str:
    """Returns the compiler's -march of the library: "native", unless XLA_FLAGS hides instruction sets."""
    limits = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    return ARCHITECTURES.get(limits[-1].upper(), "native") if limits else "native"


def library_path() -> Path:
    """Returns the path of the library for this processor, jaxlib and sources; it may not be built."""
    version = importlib.metadata.version("jaxlib")
    sources = "".join(path.read_text() for path in SOURCES + HEADERS)
    key = hashlib.sha256(f"{version} {_processor()} {architecture()} {sources}".encode()).hexdigest()[:16]
    packaged, cached = (folder / f"cpu-{key}.so" for folder in (_HERE, _cache()))
    return packaged if packaged.exists() or (os.access(_HERE, os.W_OK) and not cached.exists()) else cached


def _cache() -> Path:
    """Returns the folder for the library if that of the package cannot be written."""
    given, shared = os.environ.get("QLORA_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(shared) / "qlora_jax"


def find_compiler() -> str:
    """Returns the path of the C++ compiler.

    Raises:
      ValueError: there is none.
    """
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else COMPILERS
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise ValueError(f"no C++ compiler found (tried {', '.join(wanted)}). Install one, or set CXX to its path.")


def build() -> Path:
    """Builds the library if it does not exist, and returns its path.

    Raises:
      ValueError: no compiler was found, or compiling failed; with the first errors.
    """
    path = library_path()
    if path.exists():
        return path
    compiler = (find_compiler(), *FLAGS, f"-march={architecture()}", "-isystem", jax.ffi.include_dir())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        commands = [(*compiler, "-c", source, "-o", one) for source, one in zip(SOURCES, objects, strict=True)]
        list(pool.map(_run, commands))
        built = Path(folder) / path.name
        _run((*compiler, "-shared", *objects, "-o", built))
        built.replace(path)  # atomically, because another process may be loading or building it
    return path


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        ran = " ".join(map(str, command))
        raise ValueError(f"{ran}\nended with status {done.returncode}:\n{_errors(done.stderr)}")


def _errors(output: str) -> str:
    """Returns the first errors of a compiler's output, with long lines truncated."""
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
    return "\n".join(line[:300] for line in lines[:5])


def main() -> int:
    """Builds the library and prints its name, or the reason why it was not built."""
    try:
        print(f"built: {build().name}")
    except (ValueError, OSError) as error:
        print(f"not built, plain JAX is used instead: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
