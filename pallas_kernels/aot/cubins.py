"""The machine code in an executable: one ELF image (a cubin) per kernel of XLA, Triton or Mosaic.

Schemas: openxla/xla, xla/backends/gpu/runtime/thunk.proto and its imports. A kernel's message has its dynamic shared
memory, which the cubin does not contain. The field depends on the compiler that made the kernel.
"""

import dataclasses
from collections.abc import Iterator

from pallas_kernels.aot import protobuf

ELF, CUDA_MACHINE = b"\x7fELF", 190  # e_machine, two bytes at 18 of the ELF header; Mosaic also has host code in an ELF
MODULE_BINARY = 4  # GpuExecutableProto.binary: code shared by thunks

# (path of fields from a kernel's message to its cubin, field of its bytes of dynamic shared memory).
_XLA_KERNEL = ((2, 2, 1), 6)  # CustomKernelProto: kernel_spec, its cubin, its bytes; shared_memory_bytes
_MOSAIC_KERNEL = ((8,), 10)  # Mosaic GPU's CustomCallResources: cubin; shared memory
_FORMS = (_XLA_KERNEL, _MOSAIC_KERNEL)


@dataclasses.dataclass(frozen=True)
class Cubin:
    """One ELF image, and the bytes of shared memory that its launch adds to those that the image declares."""

    image: bytes
    dynamic_shared_bytes: int


def find_cubins(executable: bytes) -> list[Cubin]:
    """Returns all distinct cubins of a GpuExecutableProto, in order of appearance.

    Raises:
      ValueError: a cubin is in an unexpected field, so its shared memory is unknown.
    """
    return list(dict.fromkeys(_walk(executable, ())))


def _walk(message: bytes, above: tuple[tuple[int, bytes], ...]) -> Iterator[Cubin]:
    for number, value in protobuf.fields(message):
        if not isinstance(value, bytes) or ELF not in value:
            continue
        path = (*above, (number, message))
        if not value.startswith(ELF):
            yield from _walk(value, path)
        elif int.from_bytes(value[18:20], "little") == CUDA_MACHINE:
            yield Cubin(value, _dynamic_shared_bytes(path))


def _dynamic_shared_bytes(path: tuple[tuple[int, bytes], ...]) -> int:
    numbers = tuple(number for number, _ in path)
    if numbers == (MODULE_BINARY,):
        return 0
    for to_cubin, shared in _FORMS:
        if numbers[-len(to_cubin) :] == to_cubin:
            _, kernel = path[-len(to_cubin)]
            return protobuf.integer(kernel, shared)
    raise ValueError(f"XLA's executable: found a cubin at the fields {numbers}; its form has changed.")
