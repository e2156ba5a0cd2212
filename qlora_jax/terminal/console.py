"""A rich console that prints text as it is: no markup, no emoji codes, and no commands for the terminal."""

import io
from collections.abc import Iterable

import rich.console
from rich.segment import Segment

from qlora_jax.terminal.visible import visible


class Console(rich.console.Console):
    """Prints untrusted text; only rich itself sets colours and moves the cursor."""

    def __init__(
        self,
        *,
        file: io.StringIO | None = None,
        width: int | None = None,
        stderr: bool = False,
        quiet: bool = False,
        force_terminal: bool | None = None,
    ):
        super().__init__(
            file=file,
            width=width,
            stderr=stderr,
            quiet=quiet,
            force_terminal=force_terminal,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yields the segments of a renderable, with control characters in their text made visible.

        Everything that rich prints passes here: lines, tables, progress bars. Its own commands are control segments.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
