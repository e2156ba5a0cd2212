"""compile_for: a JAX function, compiled to machine code for an NVIDIA card that is not in this machine."""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.aot import placement, processes, toolchain
from pallas_kernels.aot.cubins import find_cubins
from pallas_kernels.aot.executable import read_executable
from pallas_kernels.aot.machine_code import Kernel, read_kernels
from pallas_kernels.aot.memory import MemoryUse, Temporary, read_temporaries
from pallas_kernels.aot.worker import Request
from pallas_kernels.gpu_specs import Card, find_card

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class CompiledFor:
    """A program compiled for `card`. What costs time is read when it is asked for, once.

    Fields:
      text: the optimized HLO.
      serialized: the executable as XLA serializes it.
    """

    card: Card
    memory: MemoryUse
    text: str = dataclasses.field(repr=False)
    serialized: bytes = dataclasses.field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether the program's own bytes fit the card; the CUDA context and fragmentation want about 1 GiB more."""
        return self.memory.device_total <= self.card.memory_bytes

    def check_fits(self) -> None:
        """Raises ValueError with the numbers where the program does not fit the card (XLA compiles it all the same)."""
        if self.fits:
            return
        used = self.memory.device
        parts = {"arguments": used.arguments, "outputs": used.outputs - used.aliases, "temporaries": used.temporaries}
        told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        raise ValueError(
            f"the program needs {used.total / GIB:.2f} GiB ({told}), {self.card.description} has "
            f"{self.card.memory_bytes / GIB:.2f} GiB"
        )

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """The kernels as the assembler made them; calls of libraries (cuBLAS, cuDNN) are not among them.

        Raises:
          RuntimeError: one of them is for another architecture than the card's.
        """
        kernels = read_kernels(find_cubins(self._executable))
        wrong = [f"{kernel.name}: {kernel.architecture}" for kernel in kernels]
        wrong = [one for one in wrong if not one.endswith(f" {self.card.architecture}")]
        if wrong:
            raise RuntimeError(f"compiled for {self.card.name}, {self.card.architecture}, but found {', '.join(wrong)}")
        return kernels

    @property
    def tensor_core_instructions(self) -> int:
        """Products on tensor cores in all kernels, as they stand in the code."""
        return sum(kernel.tensor_core_instructions for kernel in self.kernels)

    @property
    def spilled(self) -> tuple[str, ...]:
        """Names of the kernels that keep something in local memory because it did not fit registers."""
        return tuple(kernel.name for kernel in self.kernels if kernel.stack_bytes)

    @property
    def exceeding_shared_memory(self) -> tuple[str, ...]:
        """Names of the kernels that the card would not launch: a block can not have the shared memory they ask for."""
        return tuple(k.name for k in self.kernels if k.shared_bytes > self.card.shared_memory_per_sm)

    def largest_temporaries(self, count: int = 10) -> list[Temporary]:
        """The largest temporary buffers, on the card and in host memory."""
        return read_temporaries(self._executable, self.text)[:count]

    @functools.cached_property
    def _executable(self) -> bytes:
        return read_executable(self.serialized)


def compile_for(
    card: str,
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    **kwargs: Any,
) -> CompiledFor:
    """Compiles `fn(*args, **kwargs)` for a card of pallas_kernels.gpu_specs.CARDS, or several, which need not be here.

    While `fn` is traced, the absent card is `jax_default_device`, so that Pallas and our own dispatch make code for it;
    no array can be made on it. XLA runs in a process of its own for each architecture (pallas_kernels.aot.worker says
    why), which takes two seconds to start and ends with this one. JAX's compilation cache has no part in it.

    Args:
      card: a key of CARDS.
      fn: a function, or one that is jitted already; then its own donations and static arguments hold.
      args, kwargs: pytrees whose leaves have a shape and a dtype (arrays, ShapeDtypeStruct), of which nothing else is
        read; other leaves (numbers, static arguments) are given to `fn` as they are. Leaves are on the card, except
        those of `on_host`. Where some have a NamedSharding on an AbstractMesh, the program is for as many cards of one
        host as the mesh has: those leaves lie over them so, all others are whole on each, and memory is one card's.
        A result is in host memory where `fn` ends with `jax.device_put(x, jax.memory.Space.Host)`.
      donate_argnums, static_argnums: as jax.jit has them.

    Raises:
      CompilerUnavailableError: packages are missing, or JAX has not loaded its CUDA plugin; see `problem`.
      ValueError: an unknown card; donate_argnums or static_argnums for a function that is jitted already; array
        arguments that are all on the host, or on several meshes.
      RuntimeError: JAX did not keep an array in the memory that it was told to (pallas_kernels.aot.placement).
      CompilerCrashedError: XLA or LLVM ended its process.
      Whatever tracing and compiling raise: a kernel that this card can't run. A program larger than the card's
      memory is no error (CompiledFor.check_fits), nor is a Mosaic kernel with too much shared memory
      (CompiledFor.exceeding_shared_memory).
    """
    spec = find_card(card)
    toolchain.require()
    devices = toolchain.devices_for(spec, placement.mesh_of((args, kwargs)).size)
    args, kwargs = placement.place((args, kwargs), *devices)
    with jax.default_device(devices[0]):
        traced = _jitted(fn, donate_argnums, static_argnums).trace(*args, **kwargs)
        module = io.BytesIO()
        traced.lower().compiler_ir("stablehlo").operation.write_bytecode(module)
    program = processes.build(Request(spec, module.getvalue(), len(devices)))
    placement.check_host_kept(traced, program.text)
    return CompiledFor(spec, program.memory, program.text, program.serialized)


def _jitted(fn: Callable[..., Any], donate_argnums: int | Sequence[int], static_argnums: int | Sequence[int]) -> Any:
    if not hasattr(fn, "trace"):
        return jax.jit(fn, donate_argnums=donate_argnums, static_argnums=static_argnums)
    if donate_argnums != () or static_argnums != ():
        raise ValueError(f"{fn} is jitted already: {donate_argnums=} and {static_argnums=} belong into its own jax.jit")
    return fn
