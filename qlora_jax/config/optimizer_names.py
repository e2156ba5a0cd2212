"""Reads an optimizer's name: its update rule, and whether its state is paged."""

from typing import Literal

from qlora_jax.config.schema import OptimArgs

PAGED = "paged_"


def plain_name(name: str) -> str:
    """The optimizer's name without `paged_`; paging does not change its results."""
    return name.removeprefix(PAGED)


def paging_of(optim: OptimArgs) -> Literal["off", "on", "auto"]:
    """The paging mode: optim.paging, or for `by_name` the one that the optimizer's name implies."""
    if optim.paging == "by_name":
        return "auto" if optim.name.startswith(PAGED) else "off"
    return optim.paging
