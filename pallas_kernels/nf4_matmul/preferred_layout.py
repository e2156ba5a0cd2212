"""Which layout of the codes a device reads fastest."""

from pallas_kernels.formats.layouts import layout_problem

# The first layout of a platform's row that the weight's shape allows. All GPUs get the kernels' one, for what has no
# kernel reads it no slower than another; so the same plan holds for every card.
PREFERRED = {"cpu": ("row_planar", "bnb", "flat"), "gpu": ("split_k", "bnb", "flat")}
DEFAULT = ("bnb", "flat")


def preferred_layout(platform: str, shape: tuple[int, ...], block_size: int) -> str:
    """The layout to hold a weight (N, K) in, on a platform as jax names it (`cpu`, `gpu`)."""
    return chosen_layout(platform, shape, block_size)[0]


def chosen_layout(platform: str, shape: tuple[int, ...], block_size: int) -> tuple[str, dict[str, str]]:
    """(the preferred layout, why the shape does not allow each that the platform would rather have)."""
    refusals: dict[str, str] = {}
    for layout in PREFERRED.get(platform, DEFAULT):
        problem = layout_problem(layout, shape, block_size)
        if problem is None:
            return layout, refusals
        refusals[layout] = problem
    raise ValueError(f"no layout holds a weight of {shape=} in blocks of {block_size}")
