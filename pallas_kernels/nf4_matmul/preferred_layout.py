"""The preferred layout of each platform: the one that its kernels read fastest."""

from pallas_kernels.formats.layouts import layout_problem

# The first layout in a platform's row that the weight's shape allows is used. All GPUs use the kernels' layout, because
# cards without a kernel read it no slower than another. So one plan is valid for every card.
PREFERRED = {"cpu": ("row_planar", "bnb", "flat"), "gpu": ("split_k", "bnb", "flat")}
DEFAULT = ("bnb", "flat")


def preferred_layout(platform: str, shape: tuple[int, ...], block_size: int) -> str:
    """Returns the layout in which to store a weight (N, K) on a platform (`cpu`, `gpu`)."""
    return choose_layout(platform, shape, block_size)[0]


def choose_layout(platform: str, shape: tuple[int, ...], block_size: int) -> tuple[str, dict[str, str]]:
    """Returns (the preferred layout, why the shape does not allow each layout before it)."""
    refusals: dict[str, str] = {}
    for layout in PREFERRED.get(platform, DEFAULT):
        problem = layout_problem(layout, shape, block_size)
        if problem is None:
            return layout, refusals
        refusals[layout] = problem
    raise ValueError(f"no layout supports a weight of {shape=} in blocks of {block_size}.")
