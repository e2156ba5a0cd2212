"""Builds the C++ loops for this machine's processor: python -m pallas_kernels.native.build

There is one source, and a library per variant: a set of instructions that some processors have. Wheels bring all
variants of their platform. Elsewhere the best one for this processor is built, which requires a C++17 compiler ($CXX,
else c++, g++ or clang++). Without the loops, CPUs dequantize, multiply and attend in plain JAX, several times slower.

A library's name has its variant, a hash of the sources, and the version of XLA's interface for which it was built;
later versions load it, too. XLA's flag --xla_cpu_max_isa hides instruction sets from XLA and from the loops.
"""

import ctypes
import functools
import hashlib
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
from typing import NamedTuple

import jax

_HERE = Path(__file__).parent
SOURCES = tuple(
    _HERE / f"{name}_cpu.cc"
    for name in (
        *("nf4", "ggml", "dense", "attention", "paged_attention"),
        *("lazy_zeros", "own_matrix", "row_moments", "scale_search"),
    )
)
HEADERS = tuple(
    _HERE / f"{name}.h" for name in ("amx", "attention", "handler", "integers", "lanes", "product", "terms")
)
BUILD = "python -m pallas_kernels.native.build"
COMPILERS = ("c++", "g++", "clang++")
# No contraction: double-quantized constants are rounded twice, as in bitsandbytes.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
SUFFIX = ".so"  # on Macs, too: they load a library of any name


class Variant(NamedTuple):
    """A set of instructions.

    Attributes:
      machine: the processor's architecture, as Linux names it.
      flags: words for the compiler that allow it.
      features: the names of its instructions, in Linux's list for a processor.
      hidden_by: values of --xla_cpu_max_isa that forbid it.
    """

    machine: str
    flags: tuple[str, ...]
    features: frozenset[str]
    hidden_by: frozenset[str] = frozenset()

    @property
    def multiplies_bfloat16(self) -> bool:
        """True if there is an instruction that multiplies pairs of bfloat16 numbers."""
        return bool(self.features & {"avx512_bf16", "bf16"})


_AVX2 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_TO_AVX2 = {"AVX2"}
_TO_AVX512 = _TO_AVX2 | {"AVX512", "AVX512_VNNI"}
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}
_FLAGS_OF_AVX512_BF16 = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
_TILES = {"amx_tile", "amx_bf16"}
# The best first.
VARIANTS = {
    "amx_bf16": Variant(
        "x86_64",
        (*_FLAGS_OF_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
        frozenset(_AVX512_BF16 | _TILES),
        frozenset(_TO_AVX512 | {"AVX512_BF16"}),
    ),
    "avx512_bf16": Variant("x86_64", _FLAGS_OF_AVX512_BF16, frozenset(_AVX512_BF16), frozenset(_TO_AVX512)),
    "avx512": Variant("x86_64", ("-march=x86-64-v4",), frozenset(_AVX512), frozenset(_TO_AVX2)),
    "avx2": Variant("x86_64", ("-march=x86-64-v3",), frozenset(_AVX2)),
    "neon_bf16": Variant("aarch64", ("-march=armv8.2-a+bf16+dotprod",), frozenset({"asimd", "asimddp", "bf16"})),
    "neon": Variant("aarch64", ("-march=armv8-a",), frozenset({"asimd"})),
}
LEAST_OF_XLA = {"SSE4_2", "AVX"}  # values of --xla_cpu_max_isa that forbid every variant


@functools.cache
def features() -> frozenset[str]:
    """Returns the names of the processor's instruction sets, as Linux lists them, that this process may use."""
    if platform.system() == "Darwin":  # Macs with Apple's processors have all of NEON
        bf16 = subprocess.run(("sysctl", "-n", "hw.optional.arm.FEAT_BF16"), capture_output=True, text=True)
        return frozenset({"asimd", "asimddp", "bf16"} if bf16.stdout.strip() == "1" else {"asimd"})
    cpuinfo = Path("/proc/cpuinfo")
    listed = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", listed, re.MULTILINE)
    names = frozenset(found[1].split() if found else ())
    return names if names.isdisjoint(_TILES) or _allows_tiles() else names - _TILES


def _allows_tiles() -> bool:
    """Asks Linux for AMX's registers, which a process has to ask for; returns False if it refuses."""
    arch_prctl, request, tile_data = 158, 0x1023, 18  # linux/arch/x86/include/uapi/asm/prctl.h
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def supported_variants() -> tuple[str, ...]:
    """Returns the variants that this processor runs and XLA_FLAGS does not hide, the best first."""
    limits = [limit.upper() for limit in re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))]
    limit = limits[-1] if limits else ""  # as in XLA, the last one counts
    machine = "aarch64" if platform.machine() == "arm64" else platform.machine()  # a Mac's name
    if limit in LEAST_OF_XLA:
        return ()
    return tuple(
        name
        for name, variant in VARIANTS.items()
        if variant.machine == machine and variant.features <= features() and limit not in variant.hidden_by
    )


def interface_version(include: str | Path | None = None) -> int:
    """Returns the minor version of XLA's interface in its headers; by default, those of the installed jaxlib."""
    header = Path(include or jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = re.search(r"#define XLA_FFI_API_MINOR (\d+)", header.read_text())
    if found is None:
        raise ValueError(f"{header}: found no XLA_FFI_API_MINOR. This jaxlib is not supported.")
    return int(found[1])


def library_name(variant: str, version: int) -> str:
    """Returns the name of a variant's library that is built for a version of XLA's interface."""
    sources = "".join(path.read_text() for path in SOURCES + HEADERS)
    key = hashlib.sha256(f"{VARIANTS[variant].flags} {FLAGS} {sources}".encode()).hexdigest()[:12]
    return f"loops-{variant}-{key}-ffi{version}{SUFFIX}"


def library_path(variant: str) -> Path:
    """Returns the path of a variant's library: one that the installed jaxlib loads, or else where it is to be built."""
    names = [library_name(variant, version) for version in range(interface_version(), -1, -1)]
    for folder in (_HERE, _cache()):
        for name in names:
            if (path := folder / name).exists():
                return path
    folder = _HERE if os.access(_HERE, os.W_OK) else _cache()
    return folder / names[0]


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


def build(variant: str) -> Path:
    """Builds the library of a variant if it does not exist, and returns its path.

    Raises:
      ValueError: no compiler was found, or compiling failed; with the first errors.
    """
    path = library_path(variant)
    if not path.exists():
        compile_library(variant, path, (find_compiler(),), jax.ffi.include_dir())
    return path


def compile_library(
    variant: str, path: Path, compiler: Sequence[str], include: str, flags: Sequence[str] | None = None
) -> None:
    """Compiles the library of a variant with a compiler's command, for XLA's interface in `include`.

    `flags` replace the variant's, for a compiler that names instruction sets in another way.

    Raises:
      ValueError: compiling failed; with the first errors.
    """
    command = (*compiler, *FLAGS, *(flags or VARIANTS[variant].flags), "-isystem", include)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        commands = [(*command, "-c", source, "-o", one) for source, one in zip(SOURCES, objects, strict=True)]
        list(pool.map(_run, commands))
        built = Path(folder) / path.name
        _run((*compiler, "-shared", *objects, "-o", built))
        built.replace(path)  # atomically, because another process may be loading or building it


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
    """Builds the best variant for this processor and prints its name, or the reason why it was not built."""
    try:
        if not (variants := supported_variants()):
            raise ValueError(no_variant())
        print(f"built: {build(variants[0]).name}")
    except (ValueError, OSError) as error:
        print(f"not built, plain JAX is used instead: {error}", file=sys.stderr)
        return 1
    return 0


def no_variant() -> str:
    """Returns why no variant runs on this machine."""
    return f"this processor ({platform.machine()}) has neither AVX2 with FMA nor NEON, or XLA_FLAGS hides them"


if __name__ == "__main__":
    sys.exit(main())
