"""The library of compiled handlers: checks that it can be used, and its registration with XLA.

It is built at its first use. Without it everything works, in plain JAX.
"""

import ctypes
import functools
import os
import sys
import warnings

import jax

from pallas_kernels.native.build import BUILD, build, library_path

HANDLERS = ("nf4_dequantize", "nf4_rows", "ggml_dequantize", "ggml_rows", "product_f32")
# dtype -> (handlers that only some processors support, the instructions that they require).
ATTENTION = {
    "bfloat16": (("attention_forward", "attention_backward"), "AVX-512 with products of bfloat16 numbers"),
    "float32": (("attention_forward_f32",), "AVX-512"),
}
SWITCH = "QLORA_JAX_BUILD_LOOPS"  # environment variable


def _build_failure() -> str | None:
    """Builds the library, unless SWITCH is 0; returns the reason, of which a warning tells, if that fails."""
    if os.environ.get(SWITCH) == "0":
        return f"Run `{BUILD}`"
    print("building the C++ loops for this processor, once (about half a minute)", file=sys.stderr, flush=True)
    try:
        build()
    except (ValueError, OSError) as error:
        warnings.warn(f"the C++ loops cannot be built, so this CPU is several times slower: {error}", stacklevel=2)
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
