"""The loops of attention that this machine runs: tiles in plain JAX, each variant of the C++ loops, and the twin.

The twins are the interpreted kernels for NVIDIA GPUs. Seconds per case, so they run smaller shapes in
`mosaic/test_twin`.
"""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import api, gpu
from pallas_kernels.attention import cpu as attention_cpu
from pallas_kernels.attention.bounds import BLOCKS
from pallas_kernels.attention.mosaic.instructions import Interpreted, InterpretedWgmma
from pallas_kernels.dispatch import Choice
from pallas_kernels.native import build, library

NATIVE = build.supported_variants() if library.problem() is None else ()
TILES = "tiles"
TWINS = {f"twin of {name}": name for name in BLOCKS}
DETECTING = plgpu.InterpretGPUParams(detect_races=True)
LOOPS = [TILES, *NATIVE[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in NATIVE[1:])]


@pytest.fixture(scope="module", params=LOOPS, autouse=True)
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs every test of a module with each kind of loops."""
    yield from using(request.param)


@pytest.fixture(scope="module", params=NATIVE[:1] or [pytest.param("", marks=pytest.mark.skip("no C++ loops"))])
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with the best variant of the C++ loops."""
    yield from using(request.param)


@pytest.fixture
def tiles() -> Iterator[str]:
    """Runs a test with the tiles."""
    yield from using(TILES)


def using(name: str) -> Iterator[str]:
    """Makes attention use the named loops, which are built if they are not there."""
    with pytest.MonkeyPatch.context() as patch:
        if name == TILES:
            patch.setattr(attention_cpu, "problem", lambda: "left out")
            patch.setattr(api, "choose", lambda *call: Choice(TILES, {}))
        elif name in TWINS:
            patch.setattr(api, "choose", lambda *call: Choice(TWINS[name], {}))
            kinds = {"mma": Interpreted, "wgmma": InterpretedWgmma}
            patch.setattr(gpu, "instructions", lambda dtype, kernels: kinds[kernels](dtype, DETECTING))
        else:
            build.build(name)
            library.register(name)
            patch.setattr(library, "variant", lambda: name)
        jax.clear_caches()  # functions that were traced with other loops
        yield name
    jax.clear_caches()
