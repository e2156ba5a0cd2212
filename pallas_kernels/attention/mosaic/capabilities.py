"""The calls that the attention kernels support; does not import Mosaic."""

from jax.typing import DTypeLike

from pallas_kernels.devices import Device
from pallas_kernels.mosaic import installation

# sm_100 has faster tensor-core instructions, which no kernel uses.
MMA_DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")
DEVICES = {"wgmma": ("sm_90",), "mma": MMA_DEVICES, "decode": MMA_DEVICES}  # by kernels
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 128, 256)
WITH_CP_ASYNC = ("sm_80", "sm_86", "sm_89")
MOST_NUMBERS = 2**31  # that a signed 32-bit offset reaches; TMA, on newer cards, has coordinates along each axis
CODES = "int8"


def unsupported_reason(kernels: str, device: Device, dtype: DTypeLike, head_dim: int, numbers: int = 0) -> str | None:
    """Returns all reasons why the kernels cannot compute attention on a device, or None if they can.

    Args:
      numbers: in the array of queries.
    """
    problems = _problems(kernels, device, dtype, head_dim)
    if numbers >= MOST_NUMBERS and device.names[0] in WITH_CP_ASYNC:
        problems.append(f"{kernels} kernels on {device} take fewer than 2^31 numbers, not {numbers:,}")
    return "; ".join(problems) or _missing(kernels)


def undecodable_reason(device: Device, dtype: DTypeLike, head_dim: int, cache_dtype: DTypeLike) -> str | None:
    """Returns all reasons why the kernel of one token per row cannot read pages on a device, or None if it can.

    Args:
      cache_dtype: that of keys and values in pages, or of their codes.
    """
    problems = _problems("decode", device, dtype, head_dim)
    if str(cache_dtype) not in (str(dtype), CODES):
        problems.append(f"decode kernels with {dtype} take pages of {dtype} and {CODES}, not {cache_dtype}")
    return "; ".join(problems) or _missing("decode")


def _problems(kernels: str, device: Device, dtype: DTypeLike, head_dim: int) -> list[str]:
    table = (
        ("run on", DEVICES[kernels], device.names[0], device),
        ("take", DTYPES, str(dtype), dtype),
        ("take head dims", HEAD_DIMS, head_dim, head_dim),
    )
    return [
        f"{kernels} kernels {verb} {', '.join(map(str, known))}, not {shown}"
        for verb, known, found, shown in table
        if found not in known
    ]


def _missing(kernels: str) -> str | None:
    missing = installation.problem() or (installation.masks_problem() if kernels == "wgmma" else None)
    return missing and f"{kernels} kernels: {missing}"
