"""The calls that the attention kernels support; does not import Mosaic."""

from jax.typing import DTypeLike

from pallas_kernels.devices import Device
from pallas_kernels.mosaic import installation

# sm_90 and sm_100 have faster tensor-core instructions, which the kernels do not use.
DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 128, 256)


def unsupported_reason(device: Device, dtype: DTypeLike, head_dim: int) -> str | None:
    """Returns all reasons why the kernels cannot compute attention on a device, or None if they can."""
    table = (
        ("run on", DEVICES, device.names[0], device),
        ("take", DTYPES, str(dtype), dtype),
        ("take head dims", HEAD_DIMS, head_dim, head_dim),
    )
    problems = [
        f"mma kernels {verb} {', '.join(map(str, known))}, not {shown}"
        for verb, known, found, shown in table
        if found not in known
    ]
    return "; ".join(problems) or ((missing := installation.problem()) and f"mma kernels: {missing}")
