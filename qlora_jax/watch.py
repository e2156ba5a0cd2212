"""`qlora-jax watch RUN`: a live page of a run, from the files in its folder."""

import dataclasses
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.text import Text

from qlora_jax.config import Command, run_main
from qlora_jax.config.fields import NOT_EMPTY, Bound, setting
from qlora_jax.config.sizes import format_duration
from qlora_jax.terminal.console import Console

if TYPE_CHECKING:
    from qlora_jax.training.live.run_status import RunReader, RunStatus

PORT = Bound("from 0 to 65535", lambda value: 0 <= value < 1 << 16)
SECONDS = 2.0  # between two looks at the folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchArgs:
    """The run, and the address of the page."""

    run: str = setting("folder of a run; it may not exist yet, or lie on another machine's disk", bound=NOT_EMPTY)
    port: int = setting("port of the page; 0: a free one", 0, PORT)
    host: Literal["127.0.0.1", "::1"] = setting(
        "address of the page: of this machine only, because the page has no password", "127.0.0.1"
    )


COMMAND = Command(
    name="watch",
    summary="Shows a run on a live page while it trains and afterwards; reads its folder only.",
    example="runs/mine",
    schema=WatchArgs,
    positional="run",
)


def main(argv: list[str]) -> None:
    """Serves the page until Ctrl-C; raises ValueError for a folder that is not a run, or a port in use."""
    args, _ = COMMAND.read(argv)
    from qlora_jax.training.live.run_status import RunReader
    from qlora_jax.training.live.watch_server import WatchServer

    reader, console = RunReader(Path(args.run)), Console()
    if (status := reader.read()).state == "not a run":
        raise ValueError(status.message)
    with WatchServer(reader, args.host, args.port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        console.print(f"page: {server.address}", soft_wrap=True)
        try:
            _follow(reader, console)
        finally:
            server.shutdown()


def _follow(reader: "RunReader", console: Console) -> None:
    """Shows the run's state on one line of a terminal; elsewhere prints a line for each new state."""
    shown = ""
    with console.status("") as line:
        while True:
            status = reader.read()
            line.update(Text(_line(status)))  # a plain string would be markup
            if not console.is_terminal and status.message != shown:
                console.print(_line(status), soft_wrap=True)
            shown = status.message
            time.sleep(SECONDS)


def _line(status: "RunStatus") -> str:
    steps = f"step {status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")
    loss = f"loss {status.loss.lines[0].values[-1]:.3f}" if status.loss else ""
    left = "" if status.seconds_left is None else f"{format_duration(status.seconds_left)} left"
    return "  ".join(filter(None, (steps, loss, left, status.message)))


if __name__ == "__main__":
    run_main(main)
