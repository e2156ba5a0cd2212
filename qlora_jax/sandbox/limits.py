"""Limits on the resources and the environment of a process that runs a stranger's programs."""

import os
import resource
import sys
from collections.abc import Mapping

_NEEDED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "TZ")  # by Python itself, and for today's date


def python_environment() -> dict[str, str]:
    """Returns the environment of a Python process with the modules of this one, in any folder, and nothing else."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {"PYTHONPATH": path} | {name: os.environ[name] for name in _NEEDED if name in os.environ}


def limit_resources(limits: Mapping[int, int]) -> None:
    """Lowers limits of this process, for good; limits that are lower already stay.

    Args:
      limits: resource.RLIMIT_* -> bytes, seconds or a number.
    """
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))
