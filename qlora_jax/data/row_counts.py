"""What is counted of rows while they are read; counts of pieces add up to those of the whole."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

PERCENTILES = (1, 25, 50, 75, 95, 100)
_MAPS = ("lengths", "new_tokens")  # fields that count by number


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of rows.

    Fields:
      rows, kept: rows read, and those left after length handling.
      truncated, overlong, unsupervised: as in lengths.FittedRows.
      cut: rows in which a token was cut at the start or end of an answer, as generation cuts it.
      lossy: rows that do not decode to their own text.
      special_text: rows whose own text spells a special token; it is encoded as that token.
      doubled_bos, without_bos: rows that begin with bos twice, and without it although the tokenizer asks for it.
      tokens, supervised: targets of the kept rows, and those among them that the loss sees.
      lengths: how many rows have so many tokens, before any is cut.
      new_tokens: how often the kept rows have each new token, by id; those that they have at all.
      columns: those found, in the order that they were found in.
    """

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    overlong: int = 0
    unsupervised: int = 0
    cut: int = 0
    lossy: int = 0
    special_text: int = 0
    doubled_bos: int = 0
    without_bos: int = 0
    tokens: int = 0
    supervised: int = 0
    lengths: Mapping[int, int] = dataclasses.field(default_factory=dict)
    new_tokens: Mapping[int, int] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()

    def __add__(self, other: "RowCounts") -> "RowCounts":
        maps: dict[str, Any] = {name: _sum(getattr(self, name), getattr(other, name)) for name in _MAPS}
        names = {field.name for field in dataclasses.fields(RowCounts)} - {*_MAPS, "columns"}
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in names}
        return RowCounts(**sums, **maps, columns=tuple(dict.fromkeys((*self.columns, *other.columns))))

    @property
    def percentiles(self) -> tuple[int, ...]:
        """Tokens a row at PERCENTILES: the smallest length that so many percent of the rows do not exceed."""
        found, seen, lengths = [], 0, sorted(self.lengths.items())
        for percentile in PERCENTILES:
            while seen * 100 < percentile * self.rows and lengths:
                length, count = lengths.pop(0)
                seen += count
            found.append(length)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "RowCounts":
        """The counts that `to_dict` gave, through JSON."""
        maps = {name: {int(key): count for key, count in saved[name].items()} for name in _MAPS}
        return cls(**{**saved, **maps, "columns": tuple(saved["columns"])})


def _sum(a: Mapping[int, int], b: Mapping[int, int]) -> dict[int, int]:
    return dict(collections.Counter(a) + collections.Counter(b))
