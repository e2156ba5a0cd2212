"""Products by AMX: its instructions in software give the product, and compiled they are the instructions.

No machine at hand has AMX, so nothing here shows that the processor does what its manual says.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.native import build
from pallas_kernels.nf4_matmul import cpu
from tests.pallas_kernels.nf4_matmul.contract import weight

SOFTWARE = Path(__file__).parent / "amx_in_software.h"
VARIANT = build.VARIANTS["amx_bf16"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`compiled(*flags)`: the library of products alone; skips without a compiler that takes these flags."""

    def made(*flags: str) -> Path:
        path = tmp_path_factory.mktemp("amx") / "library.so"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "SOURCES", [source for source in build.SOURCES if source.stem == "nf4_cpu"])
            try:
                build.compile_library("amx_bf16", path, (build.find_compiler(),), jax.ffi.include_dir(), flags)
            except ValueError as error:
                pytest.skip(str(error))
        return path

    return made


@pytest.fixture(scope="module")
def in_software(compiled) -> Iterator[None]:
    """Multiplies by AMX in software."""
    without_tiles = build.VARIANTS["avx512_bf16"]
    if not without_tiles.features <= build.features():
        pytest.skip("the rest of this variant requires AVX-512 with bf16")
    library = ctypes.CDLL(str(compiled(*without_tiles.flags, "-include", str(SOFTWARE))))
    jax.ffi.register_ffi_target("nf4_product_software", jax.ffi.pycapsule(library.nf4_product), platform="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "handler", lambda name: f"{name}_software")
        patch.setattr(cpu, "multiplies_bfloat16", lambda: True)
        yield


# Rows and terms that fill registers, and that do not; several chunks of terms and blocks of rows.
SHAPES = [(32, 96, 192), (17, 98, 192), (75, 64, 1088), (1100, 34, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_the_product_in_software(in_software, rows, n, k, transposed):
    w = weight((n, k), layout="row_planar")
    dense = np.asarray(dequantize(w, jnp.bfloat16), np.float64)
    dense = dense if transposed else dense.T
    a = jnp.asarray(np.random.default_rng(0).standard_normal((rows, len(dense))), jnp.bfloat16)
    multiply = cpu.backward if transposed else cpu.forward
    found = multiply(a, w, None)
    exact, sizes = np.asarray(a, np.float64) @ dense, np.abs(np.asarray(a, np.float64)) @ np.abs(dense)
    error = np.abs(np.asarray(found, np.float64) - exact)
    of_result, of_sums = 2.0**-8 * np.abs(exact), len(dense) * 2.0**-24 * sizes
    assert (error <= of_result + of_sums).all()
    np.testing.assert_array_equal(multiply(a[-17:], w, None), found[-17:])


@pytest.mark.slow
def test_it_compiles_to_the_instructions(compiled):
    if shutil.which("objdump") is None:
        pytest.skip("objdump is missing")
    path = compiled(*VARIANT.flags)
    text = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    counts = {name: len(re.findall(rf"\t{name}\b", text)) for name in ("ldtilecfg", "tdpbf16ps", "tilerelease")}
    # Two directions: 2 x 2 registers of sums, and one configuration for each part.
    assert counts == {"ldtilecfg": 2, "tdpbf16ps": 8, "tilerelease": 2}
