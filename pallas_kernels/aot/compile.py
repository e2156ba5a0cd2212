"""compile_for: compiles a JAX function to machine code for an NVIDIA card that is not in this machine."""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.aot import placement, processes, toolchain
from pallas_kernels.aot.collectives import Collective, read_collectives
from pallas_kernels.aot.cubins import find_cubins
from pallas_kernels.aot.executable import read_executable
from pallas_kernels.aot.machine_code import Kernel, read_kernels
from pallas_kernels.aot.memory import MemoryUse, Temporary, read_temporaries
from pallas_kernels.aot.worker import CompilerOption, Request
from pallas_kernels.gpu_specs import Card, find_card

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class CompiledFor:
    """A program compiled for `card`. Expensive properties are computed on first use.

    Attributes:
      memory: bytes by kind, on the card and on the host.
      text: the optimized HLO.
      serialized: the executable in XLA's serialization.
    """

    card: Card
    memory: MemoryUse
    text: str = dataclasses.field(repr=False)
    serialized: bytes = dataclasses.field(repr=False)

    @property
    def fits(self) -> bool:
        """True if the program's bytes fit the card; the CUDA context and fragmentation take about 1 GiB more."""
        return self.memory.device_total <= self.card.memory_bytes

    def check_fits(self) -> None:
        """Raises ValueError if the program does not fit the card, with the numbers. XLA compiles it regardless."""
        if self.fits:
            return
        used = self.memory.device
        parts = {"arguments": used.arguments, "outputs": used.outputs - used.aliases, "temporaries": used.temporaries}
        text = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        raise ValueError(
            f"the program needs {used.total / GIB:.2f} GiB ({text}), {self.card.description} has "
            f"{self.card.memory_bytes / GIB:.2f} GiB"
        )

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """The kernels in the assembler's output; library calls (cuBLAS, cuDNN) are not included.

        Raises:
          RuntimeError: a kernel is not for the card's architecture.
        """
        kernels = read_kernels(find_cubins(self._executable))
        wrong = [f"{kernel.name}: {kernel.architecture}" for kernel in kernels]
        wrong = [one for one in wrong if not one.endswith(f" {self.card.architecture}")]
        if wrong:
            raise RuntimeError(f"compiled for {self.card.name}, {self.card.architecture}, but found {', '.join(wrong)}")
        return kernels

    @property
    def tensor_core_instructions(self) -> int:
        """The number of tensor-core instructions in the code of all kernels."""
        return sum(kernel.tensor_core_instructions for kernel in self.kernels)

    @property
    def spilled(self) -> tuple[str, ...]:
        """The names of kernels that spill registers to local memory."""
        return tuple(kernel.name for kernel in self.kernels if kernel.stack_bytes)

    @property
    def exceeding_shared_memory(self) -> tuple[str, ...]:
        """The names of kernels that the card cannot launch, because a block exceeds the available shared memory."""
        return tuple(k.name for k in self.kernels if k.shared_bytes > self.card.shared_memory_per_sm)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """The operations by which several cards exchange arrays; none for one card."""
        return read_collectives(self.text)

    def largest_temporaries(self, count: int = 10) -> list[Temporary]:
        """Returns the largest temporary buffers, on the card and in host memory."""
        return read_temporaries(self._executable, self.text)[:count]

    @functools.cached_property
    def _executable(self) -> bytes:
        return read_executable(self.serialized)


def compile_for(
    card: str,
    fn: Callable[..., object],
    *args: object,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    compiler_options: Mapping[str, CompilerOption] | None = None,
    **kwargs: object,
) -> CompiledFor:
    """Compiles `fn(*args, **kwargs)` for one or several cards of pallas_kernels.gpu_specs.CARDS, which may be absent.

    While `fn` is traced, the absent card is `jax_default_device`, so that Pallas and our own dispatch make code for it.
    No array can be made on it. XLA runs in a separate process per architecture (see pallas_kernels.aot.worker), which
    takes two seconds to start and ends with this process. JAX's compilation cache is not used.

    Args:
      card: a key of CARDS.
      fn: a function; if it is already jitted, its own donations, static arguments and compiler options apply.
      args, kwargs: pytrees of arrays or ShapeDtypeStructs, of which only shape, dtype and sharding are read. Other
        leaves (numbers, static arguments) are passed to `fn` unchanged. Leaves are on the card, except those of
        `on_host`. If leaves have a NamedSharding on an AbstractMesh, the program is for that many cards of one host:
        these leaves are sharded, all others are replicated, and memory is that of one card. A result is in host
        memory if `fn` ends with `jax.device_put(x, jax.memory.Space.Host)`.
      donate_argnums, static_argnums: those of jax.jit.
      compiler_options: those of jax.stages.Lowered.compile, added to those of a jitted function.

    Raises:
      CompilerUnavailableError: packages are missing, or JAX has not loaded its CUDA plugin; see `problem`.
      ValueError: an unknown card; donate_argnums or static_argnums for a jitted function; array arguments that are all
        on the host, or on several meshes.
      RuntimeError: JAX dropped an array's memory kind (pallas_kernels.aot.placement).
      CompilerCrashedError: XLA or LLVM ended its process.
      Other errors of tracing and compiling: the card does not support a kernel. A program larger than the card's
      memory is not an error (CompiledFor.check_fits), nor is a Mosaic kernel with too much shared memory
      (CompiledFor.exceeding_shared_memory).
    """
    spec = find_card(card)
    toolchain.require()
    devices = toolchain.devices_for(spec, placement.mesh_of((args, kwargs)).size)
    args, kwargs = placement.place((args, kwargs), *devices)
    with jax.default_device(devices[0]):
        traced = _jitted(fn, donate_argnums, static_argnums).trace(*args, **kwargs)
        module = io.BytesIO()
        lowered = traced.lower()
        lowered.compiler_ir("stablehlo").operation.write_bytecode(module)
    options = _options(lowered) | dict(compiler_options or {})
    program = processes.build(Request(spec, module.getvalue(), len(devices), options))
    placement.check_host_kept(traced, program.text)
    return CompiledFor(spec, program.memory, program.text, program.serialized)


def _options(lowered: jax.stages.Lowered) -> dict[str, CompilerOption]:
    """Returns the compiler options of the jitted function, which jax.stages has no public name for."""
    return dict(lowered._lowering._compiler_options_kvs)  # type: ignore[attr-defined]


def _jitted(fn: Callable[..., object], donate_argnums: int | Sequence[int], static_argnums: int | Sequence[int]) -> Any:
    if not hasattr(fn, "trace"):
        return jax.jit(fn, donate_argnums=donate_argnums, static_argnums=static_argnums)
    if donate_argnums != () or static_argnums != ():
        raise ValueError(f"{fn} is jitted already: {donate_argnums=} and {static_argnums=} belong in its own jax.jit.")
    return fn
