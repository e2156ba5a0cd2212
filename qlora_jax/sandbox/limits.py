"""Limits on the resources of a process that runs a stranger's programs."""

import resource
from collections.abc import Mapping


def limit_resources(limits: Mapping[int, int]) -> None:
    """Lowers limits of this process, for good; limits that are lower already stay.

    Args:
      limits: resource.RLIMIT_* -> bytes, seconds or a number.
    """
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))
