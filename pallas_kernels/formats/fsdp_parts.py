"""Parts of a weight's codes, one per device of an FSDP axis, and the rows of the weight that each part holds.

The codes are cut into equal parts along one axis of their bytes. A part is not a weight: all are gathered before they
are multiplied. Parts that are weights themselves are in pallas_kernels.formats.shards.

Dimension key: N out, K in, s parts.

| layout       | cut along its first axis, part p holds                | cut along its second axis |
|--------------|-------------------------------------------------------|---------------------------|
| `bnb`        | rows p N/s to (p+1) N/s                               | all rows                  |
| `split_k`    | rows p N/s to (p+1) N/s                               | all rows                  |
| `row_planar` | rows p N/2s to (p+1) N/2s, and the same rows from N/2 | all rows                  |
| `flat`       | all rows, because a cut may go through a block        |                           |
"""

import dataclasses

from pallas_kernels.formats.layouts import Array

Rows = tuple[tuple[int, int], ...]  # ranges of rows: from the first up to, not including, the second


def equal_rows(rows: int, part: int, parts: int) -> Rows:
    """Returns the rows of one of `parts` equal parts."""
    size = rows // parts
    return ((part * size, (part + 1) * size),)


@dataclasses.dataclass(frozen=True)
class FsdpParts:
    """Equal parts of the codes of one weight.

    Attributes:
      layout: a key of LAYOUTS.
      shape: the weight's shape.
      axis: the axis of the codes that is cut, counted from the first.
      parts: number of parts.
    """

    layout: str
    shape: tuple[int, ...]
    axis: int = 0
    parts: int = 1

    @property
    def by_rows(self) -> bool:
        """True if a part holds whole rows of the weight, and no other part holds a piece of them."""
        return self.parts > 1 and self.axis == 0 and self.layout != "flat"

    def rows(self, part: int) -> Rows:
        """Returns the rows whose codes a part holds, in the order in which it holds them."""
        n = self.shape[0]
        if not self.by_rows:
            return ((0, n),)
        if self.layout != "row_planar":
            return equal_rows(n, part, self.parts)
        ((first, end),) = equal_rows(n // 2, part, self.parts)
        return ((first, end), (n // 2 + first, n // 2 + end))

    def slice(self, codes: Array, part: int) -> Array:
        """Returns a part of the codes from those of `self.rows(part)` in `layout`, concatenated."""
        if self.by_rows or self.parts == 1:
            return codes
        size = codes.shape[self.axis] // self.parts
        return codes[(slice(None),) * self.axis + (slice(part * size, (part + 1) * size),)]
