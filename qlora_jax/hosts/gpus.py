"""Divides the GPUs of a machine among its processes, so that none is claimed twice.

JAX takes the GPU whose index is the process's number on its machine. A launcher that starts one process per machine
would then use a single GPU of each, and one that shows each process only its own GPUs would break.
"""

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

_UUID_BYTES = 16


class Seen(NamedTuple):
    """The GPUs of one process.

    Attributes:
      name: the process, for messages.
      gpus: UUIDs of the GPUs that the process can see, in CUDA's order.
      wanted: indices of `gpus` to drive; None for its share.
    """

    name: str
    gpus: tuple[str, ...]
    wanted: tuple[int, ...] | None


def visible_gpus() -> tuple[str, ...]:
    """Returns the UUIDs of the NVIDIA GPUs that this process can see, in CUDA's order; empty without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_uuid(cuda, index) for index in range(count.value))


def _uuid(cuda: ctypes.CDLL, index: int) -> str:
    device, uuid = ctypes.c_int(), (ctypes.c_ubyte * _UUID_BYTES)()
    # The second version gives parts of a GPU (MIG) their own UUIDs.
    if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetUuid_v2(uuid, device):
        raise OSError(f"GPU {index}: the NVIDIA driver does not give its UUID. Check the driver with nvidia-smi")
    return bytes(uuid).hex()


def divide(seen: Sequence[Seen]) -> list[tuple[int, ...]]:
    """Returns for each process the indices of the GPUs that it drives; empty if it sees none.

    Processes that see the same GPUs and want none in particular share them evenly.

    Raises:
      ValueError: GPUs do not divide, do not exist, or are claimed twice; all problems at once.
    """
    problems: list[str] = []
    chosen = [_share(each, seen, problems) if each.wanted is None else each.wanted for each in seen]
    claims: dict[str, list[str]] = defaultdict(list)
    for each, indices in zip(seen, chosen, strict=True):
        missing = [index for index in indices if not 0 <= index < len(each.gpus)]
        if missing:
            problems.append(f"hosts.devices: found {missing} in {each.name}, which sees {len(each.gpus)} GPUs")
        for index in set(indices) - set(missing):
            claims[each.gpus[index]].append(f"{each.name} (its GPU {index})")
    problems += [f"one GPU is claimed by {' and by '.join(names)}" for names in claims.values() if len(names) > 1]
    if problems:
        raise ValueError(
            "\n  ".join(["hosts: the processes cannot share the GPUs:", *dict.fromkeys(problems)])
            + "\nGive each process other GPUs, with the launcher, CUDA_VISIBLE_DEVICES or hosts.devices"
        )
    return chosen


def _share(process: Seen, seen: Sequence[Seen], problems: list[str]) -> tuple[int, ...]:
    same = [each for each in seen if each.gpus == process.gpus and each.wanted is None]
    count, left = divmod(len(process.gpus), len(same))
    if process.gpus and (left or not count):
        names = ", ".join(each.name for each in same)
        problems.append(f"{len(same)} processes see the same {len(process.gpus)} GPUs, which do not divide ({names})")
        return ()
    first = same.index(process) * count
    return tuple(range(first, first + count))
