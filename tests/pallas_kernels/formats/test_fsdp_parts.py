"""Parts of codes: each follows from its own rows, and together they are the codes of the whole weight."""

import numpy as np
import pytest

from pallas_kernels.formats.fsdp_parts import FsdpParts
from pallas_kernels.formats.layouts import LAYOUTS, convert_codes
from tests.pallas_kernels.nf4_matmul.contract import weight

CUTS = [
    *(
        (layout, (128, 192), axis, parts)
        for layout in ("bnb", "row_planar", "split_k")
        for axis in (0, 1)
        for parts in (2, 8)
    ),
    ("bnb", (18, 64), 0, 3),
    ("split_k", (192, 128), 0, 6),  # parts of 32 rows, half a tile of the kernels
    ("flat", (64, 40), 0, 8),
    ("flat", (12, 20), 0, 8),  # parts of 30 elements, which go through blocks and rows
    ("bnb", (64, 64), 0, 1),
]


@pytest.mark.parametrize(("layout", "shape", "axis", "parts"), CUTS)
def test_parts_of_rows_are_the_codes_of_the_weight(layout, shape, axis, parts):
    natural = weight(shape, layout="flat" if layout == "flat" else "bnb")
    whole = np.asarray(convert_codes(natural.codes, shape, natural.layout, layout))
    cut = FsdpParts(layout, shape, axis, parts)
    found, seen = [], []
    for part in range(parts):
        rows = [row for first, end in cut.rows(part) for row in range(first, end)]
        own = np.asarray(natural.codes) if layout == "flat" else np.asarray(natural.codes)[rows]
        found.append(cut.slice(convert_codes(own, (len(rows), shape[1]), natural.layout, layout), part))
        seen += rows if cut.by_rows else []
    np.testing.assert_array_equal(np.concatenate(found, axis), whole, strict=True)
    assert sorted(seen) == list(range(shape[0])) or not cut.by_rows
    assert {each.shape for each in found} == {found[0].shape}
    assert whole.shape == LAYOUTS[layout].codes_shape(shape)
