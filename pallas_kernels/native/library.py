"""Where the compiled handlers lie, whether they can be used, and their registration with XLA.

The library is built for one processor, by one jaxlib's headers and from one source: its name says which, so that none
is ever loaded elsewhere. Without it everything works, in plain JAX.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("nf4_cpu.cc")
HANDLERS = ("nf4_dequantize", "nf4_rows")
BUILD = "python -m pallas_kernels.native.build"


def _processor() -> str:
    """The instruction sets of this machine's processor, as Linux tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags.*$", cpuinfo.read_text(errors="replace"), re.MULTILINE) if cpuinfo.exists() else None
    return f"{platform.machine()} {found[0] if found else platform.processor()}"


def library_path() -> Path:
    """The library for this processor, this jaxlib and this source, whether it has been built or not."""
    version = importlib.metadata.version("jaxlib")
    key = hashlib.sha256(f"{version} {_processor()} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    return SOURCE.with_name(f"nf4_cpu-{key}.so")


@functools.cache
def problem() -> str | None:
    """Why the handlers cannot be used here; None: they can, and XLA knows them."""
    path = library_path()
    if not path.exists():
        return f"has not been built for this processor and jaxlib: `{BUILD}` does"
    library = ctypes.CDLL(str(path))
    for name in HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None
