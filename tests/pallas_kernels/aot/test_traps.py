"""Silent failures of compiling for an absent card with JAX alone.

Each has two tests: compile_for avoids the failure, and JAX still has it (`_jax_` in the name). If a test of the second
kind fails, JAX has fixed something, and pallas_kernels.aot may become simpler.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.aot import on_host, placement, toolchain
from pallas_kernels.gpu_specs import CARDS

ROOT = Path(__file__).resolve().parents[3]
F32 = jnp.float32
Abstract = jax.ShapeDtypeStruct


def sharding(card, **kind):
    mesh = Mesh([toolchain.device_for(CARDS[card])], ("device",))
    return NamedSharding(mesh, PartitionSpec(), **kind)


def on_card(card, shape, dtype=F32, **kind):
    return Abstract(shape, dtype, sharding=sharding(card, **kind))


@pytest.fixture
def jax_alone(compile_for):
    """Returns (card, fn, *args, **of_jit) -> Compiled, by JAX without compile_for; skips if that skips."""

    def compile_(card, fn, *args, **of_jit):
        with jax.default_device(toolchain.device_for(CARDS[card])):
            return jax.jit(fn, **of_jit).lower(*args).compile()

    return compile_


def test_an_array_in_host_memory_stays_there(compile_for, offload):
    compiled = compile_for("a100", offload, Abstract((256, 256), F32), on_host(Abstract((256, 256), F32)))
    assert compiled.memory.host.arguments == compiled.memory.host.outputs == 256 * 256 * 4
    assert "S(5)" in compiled.text


def test_jax_drops_memory_kinds_on_a_compile_only_device(jax_alone):
    kept = on_card("a100", (256, 256), memory_kind="pinned_host")
    compiled = jax_alone("a100", lambda x, kept: x + kept, on_card("a100", (256, 256)), kept)
    assert "S(5)" not in compiled.as_text()
    assert compiled.memory_analysis().host_argument_size_in_bytes == 0


@pytest.mark.parametrize("dropped", [":S(5)})->", ":S(5)})}, "])
def test_a_program_with_a_dropped_memory_kind_is_an_error(compile_for, offload, dropped):
    args = placement.place(
        (Abstract((256, 256), F32), on_host(Abstract((256, 256), F32))), toolchain.device_for(CARDS["a100"])
    )
    text = compile_for("a100", offload, *args).text
    assert dropped in text
    placement.check_host_kept(jax.jit(offload).trace(*args), text)
    with pytest.raises(RuntimeError, match=r"has \(1, 1\) .* in host memory, JAX compiled it with \((0, 1|1, 0)\)"):
        placement.check_host_kept(jax.jit(offload).trace(*args), text.replace(dropped, dropped.removeprefix(":S(5)")))


def test_a_donated_argument_does_not_become_a_result_in_the_other_memory(compile_for, offload):
    args = (Abstract((256, 256), F32), on_host(Abstract((256, 256), F32)))
    with pytest.raises(RuntimeError, match=r"result 0 the bytes of donated argument 1 .* do not donate that argument"):
        compile_for("a100", offload, *args, donate_argnums=1)


def test_jax_matches_donations_across_memories(jax_alone, offload):
    args = placement.place(
        (Abstract((256, 256), F32), on_host(Abstract((256, 256), F32))), toolchain.device_for(CARDS["a100"])
    )
    analysis = jax_alone("a100", offload, *args, donate_argnums=1).memory_analysis()
    assert analysis.host_output_size_in_bytes == 2 * 256 * 256 * 4  # one of the two results was to be on the card


def test_a_program_above_the_cards_memory_is_told_with_its_numbers(compile_for):
    def twice(x):
        return x * 2

    compiled = compile_for("rtx4090", twice, Abstract((4 << 30,), F32))
    assert not compiled.fits
    with pytest.raises(
        ValueError, match=r"needs 32\.00 GiB \(arguments 16\.00, outputs 16\.00, temporaries 0\.00\), .*"
    ):
        compiled.check_fits()
    smaller = compile_for("rtx4090", twice, Abstract((2 << 30,), F32))
    assert smaller.fits
    smaller.check_fits()


def test_jax_compiles_what_no_card_can_hold(jax_alone):
    compiled = jax_alone("rtx4090", lambda x: x * 2, on_card("rtx4090", (16 << 30,)))
    assert compiled.memory_analysis().argument_size_in_bytes == 64 << 30 > CARDS["rtx4090"].memory_bytes


def hopper_copy(x):
    """Copies by TMA, which cards before Hopper do not have."""

    def kernel(x_ref, o_ref, scratch, barrier):
        plgpu.copy_gmem_to_smem(x_ref, scratch, barrier)
        plgpu.barrier_wait(barrier)
        o_ref[...] = scratch[...]

    scratch = [plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()]
    return plgpu.kernel(kernel, out_type=Abstract(x.shape, x.dtype), scratch_types=scratch)(x)


def test_a_kernel_for_hopper_is_compiled_for_hopper(compile_for):
    (kernel,) = compile_for("h100", hopper_copy, Abstract((128, 64), F32)).kernels
    assert kernel.opcodes["UTMALDG"] + kernel.opcodes["UBLKCP"] > 0
    assert kernel.shared_bytes >= 128 * 64 * 4


@pytest.mark.parametrize("card", ["a100", "a6000", "l40s"])
def test_a_kernel_for_hopper_is_refused_for_an_older_card(compile_for, card):
    with pytest.raises(ValueError, match="Hopper"):
        compile_for(card, hopper_copy, Abstract((128, 64), F32))


def test_jax_takes_an_unknown_card_for_a_hopper(compile_for):
    traced = jax.jit(hopper_copy).trace(on_card("a100", (128, 64)))
    traced.lower()  # no error: without a default device Pallas assumes sm_90


def register_copy(x):
    """Copies through registers, which every card supports."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    return plgpu.kernel(kernel, out_type=Abstract(x.shape, x.dtype))(x)


def test_a_mosaic_kernel_is_compiled_for_one_card_after_another(compile_for):
    for card in ("h100", "a100", "l40s", "h100", "a6000"):
        (kernel,) = compile_for(card, register_copy, Abstract((128, 64), F32)).kernels
        assert kernel.architecture == CARDS[card].architecture


JAX_ALONE_FOR_TWO_CARDS = """
import runpy
import jax, jax.numpy as jnp
from pallas_kernels.aot import compile, memory, placement, toolchain
from pallas_kernels.gpu_specs import CARDS

# Not `import tests`: a package of that name that others install would be found before this folder.
register_copy = runpy.run_path("tests/pallas_kernels/aot/test_traps.py")["register_copy"]

for card in (CARDS["h100"], CARDS["a100"]):
    device = toolchain.device_for(card)
    (x,) = placement.place((jax.ShapeDtypeStruct((128, 64), jnp.float32),), device)
    with jax.default_device(device):
        compiled = jax.jit(register_copy).lower(x).compile()
    used = memory.read_memory(compiled.memory_analysis())
    done = compile.CompiledFor(card, used, compiled.as_text(), compiled.runtime_executable().serialize())
    try:
        print([kernel.architecture for kernel in done.kernels])
    except RuntimeError as error:
        print(error)
"""


def test_jax_keeps_the_architecture_of_a_processs_first_mosaic_kernel(compile_for):
    done = subprocess.run([sys.executable, "-c", JAX_ALONE_FOR_TWO_CARDS], cwd=ROOT, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "['sm_90a']"
    assert second == "compiled for a100, sm_80, but found kernel_mosaic_gpu_kernel: sm_90a"


def roomy_copy(x):
    """Copies, and requests 120 KiB of shared memory."""

    def kernel(x_ref, o_ref, scratch):
        o_ref[...] = x_ref[...]

    scratch = [plgpu.SMEM((240, 128), F32)]
    return plgpu.kernel(kernel, out_type=Abstract(x.shape, x.dtype), scratch_types=scratch)(x)


@pytest.mark.parametrize(("card", "exceeds"), [("a100", False), ("a6000", True), ("l40s", True)])
def test_a_kernel_with_more_shared_memory_than_the_card_has_is_told(compile_for, card, exceeds):
    # JAX compiles it regardless (the other half of this trap): Mosaic's limit is not that of the card.
    compiled = compile_for(card, roomy_copy, Abstract((128, 64), F32))
    assert len(compiled.exceeding_shared_memory) == exceeds
    assert 120 << 10 <= compiled.kernels[0].shared_bytes < 124 << 10


def test_bytes_on_the_card_are_without_those_of_the_host(compile_for, offload):
    args = (Abstract((1 << 20,), F32), on_host(Abstract((1 << 20,), F32)))
    compiled = compile_for("h100", offload, *args)
    assert compiled.memory.device_total < 13 << 20  # x, its result, and `moved`: 4 MiB each


def test_jax_adds_the_hosts_bytes_to_the_cards_peak(jax_alone, offload):
    args = placement.place(
        (Abstract((1 << 20,), F32), on_host(Abstract((1 << 20,), F32))), toolchain.device_for(CARDS["h100"])
    )
    used = jax_alone("h100", offload, *args).memory_analysis()
    # A card's own peak is at most its arguments, outputs and temporaries.
    most = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    assert used.peak_memory_in_bytes > most + used.host_argument_size_in_bytes // 2


def test_jax_has_no_cost_analysis(jax_alone):
    assert jax_alone("a100", lambda x: x @ x, on_card("a100", (256, 256))).cost_analysis() is None


@pytest.fixture
def cache_folder(tmp_path):
    """Enables JAX's compilation cache in a new folder, for every program."""
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_off_the_compilation_cache(compile_for, cache_folder):
    compile_for("a100", jnp.tanh, Abstract((256,), F32))
    assert list(cache_folder.iterdir()) == []


def test_jax_stores_programs_that_it_can_not_load(jax_alone, cache_folder):
    jax_alone("a100", jnp.tanh, on_card("a100", (256,)))
    assert list(cache_folder.iterdir())
    jax.clear_caches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax_alone("a100", jnp.tanh, on_card("a100", (256,)))
    assert any("Error reading persistent compilation cache" in str(warning.message) for warning in caught)
