"""The result that every exporter returns."""

import dataclasses
from pathlib import Path

from qlora_jax.io.export.verify import LogitDifference


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A finished export; `str` gives its lines.

    Attributes:
      path: the file or folder that was written.
      lines: lines for the user: the output, the base, limits of programs that read it.
      difference: how far the logits of a merged model are from those of base and adapter; None for an adapter.
    """

    path: Path
    lines: tuple[str, ...]
    difference: LogitDifference | None = None

    def __str__(self) -> str:
        return "\n".join(self.lines)
