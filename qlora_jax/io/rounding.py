"""Rounds the weights of a model to the dtype in which they are stored, and checks that they fit into it."""

import numpy as np

MAX_FLOAT16 = float(np.finfo(np.float16).max)


def rounded(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor in `dtype`.

    Raises:
      ValueError: a value is beyond the dtype's range; names the tensor.
    """
    with np.errstate(over="ignore"):  # the check names the tensor
        stored = values.astype(dtype, copy=False)
    check_range(name, values, stored)
    return stored


def check_range(name: str, values: np.ndarray, stored: np.ndarray) -> None:
    """Checks that rounding a tensor to float16 made no finite value infinite.

    Raises:
      ValueError: a value is beyond float16's range; names the tensor.
    """
    if stored.dtype != np.float16 or not stored.size or _is_finite(stored):
        return
    largest = float(np.abs(values.astype(np.float32)).max())
    if np.isfinite(largest):
        raise ValueError(
            f"{name}: beyond the range of float16 (found {largest:,.0f}, expected at most {MAX_FLOAT16:,.0f}). Choose "
            "bfloat16 or float32"
        )


def _is_finite(stored: np.ndarray) -> bool:
    """True if no float16 is infinite or not a number: by their bits, ten times as fast as np.isfinite."""
    infinity, sign = 0x7C00, 0x8000
    return bool(stored.view(np.int16).max() < infinity and stored.view(np.uint16).max() < sign + infinity)


def rounding_note(dtype: str, computed: str) -> list[str]:
    """Returns a note for the base of an adapter that is stored in fewer bits than training computed in, or none."""
    if dtype in (computed, "float32"):
        return []
    return [f"the base is rounded from {computed}, in which training computed, to {dtype}: its logits differ slightly"]
