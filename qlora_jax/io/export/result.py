"""The result that every exporter returns, and its line about the other parts of a multimodal model."""

import dataclasses
from pathlib import Path

from qlora_jax.io.export.verify import LogitDifference
from qlora_jax.model_source import ModelSource

DRAFTS = "layers that predict further tokens are left out: {}"


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

    def with_other_parts(self, source: ModelSource, text: str) -> "ExportResult":
        """Adds what happened to the parts beside the text half of a multimodal model, and to layers that draft tokens.

        Args:
          text: the format's line, with {} for these parts.
        """
        others = [] if source.multimodal is None else [text.format(source.multimodal)]
        drafts = [DRAFTS.format(source.draft_text)] if source.drafts else []
        return dataclasses.replace(self, lines=(*self.lines, *others, *drafts))
