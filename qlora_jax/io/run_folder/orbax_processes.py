"""The processes that read or write a checkpoint together, as orbax wants to hear of them.

Without their names orbax waits for them by a collective, which gives up after 30 s on CPUs, and for all devices.
"""

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost

SECONDS = 600


def named_processes() -> ocp.options.MultiprocessingOptions:
    """Returns orbax's options with all processes by number; its defaults for one process."""
    count = jax.process_count()
    return ocp.options.MultiprocessingOptions(active_processes=set(range(count)) if count > 1 else None)


def meet(name: str) -> None:
    """Waits for all processes; each name is used once."""
    multihost.sync_global_processes(name, processes=set(range(jax.process_count())), timeout=SECONDS)
