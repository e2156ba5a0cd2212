"""What the names of optimizers say: which update, how its state is held, and whether it is paged."""

from typing import Literal

from qlora_jax.config.schema import OptimArgs

PAGED = "paged_"


def plain_name(name: str) -> str:
    """The optimizer whose numbers a name's are: paging changes no bit."""
    return name.removeprefix(PAGED)


def paging_of(optim: OptimArgs) -> Literal["off", "on", "auto"]:
    """What is done: optim.paging, or by the optimizer's name."""
    if optim.paging == "by_name":
        return "auto" if optim.name.startswith(PAGED) else "off"
    return optim.paging
