"""The library of C++ loops for this processor, and the registration of its handlers with XLA.

It is built at its first use, unless it came with a wheel. Without it everything works, in plain JAX.
"""

import ctypes
import functools
import os
import sys
import warnings

import jax

from pallas_kernels.native.build import BUILD, VARIANTS, build, library_path, no_variant, supported_variants

HANDLERS = (
    "nf4_dequantize",
    "nf4_rows",
    "ggml_dequantize",
    "ggml_rows",
    "nf4_product",
    "product_f32",
    "dense_rows",
    "attention_forward",
    "attention_backward",
    "attention_paged",
    "lazy_zeros",
    "own_matrix",
    "row_moments",
    "scale_search",
)
SWITCH = "QLORA_JAX_BUILD_LOOPS"  # environment variable


def _build_failure(variant: str) -> str | None:
    """Builds a variant, unless SWITCH is 0; returns the reason, of which a warning tells, if that fails."""
    if os.environ.get(SWITCH) == "0":
        return f"Run `{BUILD}`"
    print("building the C++ loops for this processor, once (about half a minute)", file=sys.stderr, flush=True)
    try:
        build(variant)
    except (ValueError, OSError) as error:
        warnings.warn(f"the C++ loops cannot be built, so this CPU is several times slower: {error}", stacklevel=2)
        return f"{error}"


def variant() -> str | None:
    """Returns the variant of the loops: the best for this processor; None if no variant runs on it."""
    return next(iter(supported_variants()), None)


@functools.cache
def problem() -> str | None:
    """Returns why the loops cannot be used, or None after building and registering them with XLA."""
    if (found := variant()) is None:
        return no_variant()
    if not library_path(found).exists() and (failure := _build_failure(found)):
        return f"is not built for this processor and jaxlib. {failure}"
    register(found)
    return None


def handler(name: str) -> str:
    """Returns the name under which a handler of this processor's variant is registered with XLA."""
    return f"{name}_{variant()}"


def multiplies_bfloat16() -> bool:
    """True if this processor's variant multiplies pairs of bfloat16 numbers."""
    return (found := variant()) is not None and VARIANTS[found].multiplies_bfloat16


def fast_bfloat16() -> bool:
    """True if XLA multiplies bfloat16 matrices fast on this processor: x86-64 with AVX-512 bf16.

    Elsewhere XLA converts them to f32 first. How fast it is on ARM with bf16 instructions was not measured.
    """
    return multiplies_bfloat16() and VARIANTS[f"{variant()}"].machine == "x86_64"


@functools.cache
def register(variant: str) -> None:
    """Registers all handlers of a variant, whose library is built, as <handler>_<variant>."""
    library = ctypes.CDLL(str(library_path(variant)))
    for name in HANDLERS:
        jax.ffi.register_ffi_target(f"{name}_{variant}", jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
