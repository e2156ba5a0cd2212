"""The library of compiled handlers: its path, checks that it can be used, and its registration with XLA.

The library's name has a hash of the processor, the jaxlib version and the sources, so it is never loaded elsewhere. It
is built at its first use. Without it everything works, in plain JAX. XLA's flag --xla_cpu_max_isa hides instruction
sets from both.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
import warnings
from pathlib import Path

import jax

_HERE = Path(__file__).parent
SOURCES = tuple(_HERE / f"{name}_cpu.cc" for name in ("nf4", "ggml", "matmul_f32", "attention", "attention_f32"))
HEADERS = tuple(_HERE / f"{name}.h" for name in ("attention", "buffer", "floats", "parallel"))
HANDLERS = ("nf4_dequantize", "nf4_rows", "ggml_dequantize", "ggml_rows", "product_f32")
# dtype -> (handlers that only some processors support, the instructions that they require).
ATTENTION = {
    "bfloat16": (("attention_forward", "attention_backward"), "AVX-512 with products of bfloat16 numbers"),
    "float32": (("attention_forward_f32",), "AVX-512"),
}
# Value of --xla_cpu_max_isa -> what the compiler may use. Without the flag, or with another value: all that there is.
ARCHITECTURES = {"SSE4_2": "x86-64-v2", "AVX": "x86-64-v2", "AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
BUILD = "python -m pallas_kernels.native.build"
SWITCH = "QLORA_JAX_BUILD_LOOPS"  # environment variable


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


def _build_failure() -> str | None:
    """Builds the library, unless SWITCH is 0; returns the reason, of which a warning tells, if that fails."""
    if os.environ.get(SWITCH) == "0":
        return f"Run `{BUILD}`"
    from pallas_kernels.native.build import build  # which imports this module

    print("building the C++ loops for this processor, once (about half a minute)", file=sys.stderr, flush=True)
    try:
        build()
    except (ValueError, OSError) as error:
        warnings.warn(f"C++ loops could not be built, so this CPU is several times slower: {error}", stacklevel=2)
        return f"{error}"


@functools.cache
def problem() -> str | None:
    """Returns why the product handlers cannot be used, or None after building and registering them with XLA."""
    if not library_path().exists() and (failure := _build_failure()):
        return f"is not built for this processor and jaxlib. {failure}"
    _register(HANDLERS)
    return None


@functools.cache
def attention_problem(dtype: str = "bfloat16") -> str | None:
    """Returns why the attention handlers of a dtype cannot be used, or None after registering them with XLA."""
    if missing := problem():
        return missing
    names, wanted = ATTENTION[dtype]
    if not hasattr(_library(), names[0]):
        return f"this processor does not support {wanted}"
    _register(names)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


def _register(names: tuple[str, ...]) -> None:
    for name in names:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(_library(), name)), platform="cpu")
