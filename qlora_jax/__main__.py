"""`qlora-jax COMMAND ...` and `python -m qlora_jax COMMAND ...`: lists the commands, or runs one."""

import importlib
import sys

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.terminal.visible import visible

COMMANDS = ("train", "generate", "predict", "evaluate", "compare", "arena", "variance", "export", "quantize", "plan")


def main() -> None:
    """Runs the command that the first argument names; without one, lists the commands."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(overview())
    elif name in COMMANDS:
        if name != "plan":  # it computes nothing
            allocator.tune()
        run_main(importlib.import_module(f"qlora_jax.{name}").main, arguments)
    else:
        print(f"error: {visible(name)}: unknown command\n\n{overview()}", file=sys.stderr)
        sys.exit(2)


def overview() -> str:
    """The list of commands, one line each."""
    lines = ["usage: qlora-jax COMMAND [--config FILE] [--key value ...]", ""]
    for name in COMMANDS:
        command: Command = importlib.import_module(f"qlora_jax.{name}").COMMAND
        lines.append(f"  {name:<10}{command.summary}")
    return "\n".join([*lines, "", "qlora-jax COMMAND --help shows a command's settings."])


if __name__ == "__main__":
    main()
