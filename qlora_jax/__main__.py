"""`qlora-jax COMMAND ...` and `python -m qlora_jax COMMAND ...`: lists the commands, or runs one."""

import importlib
import importlib.metadata
import platform
import sys
from types import ModuleType

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.config.suggestions import suggest_key
from qlora_jax.terminal.visible import visible

COMMANDS = (
    "train",
    "watch",
    "generate",
    "serve",
    "predict",
    "pairs",
    "evaluate",
    "compare",
    "arena",
    "variance",
    "export",
    "merge-adapters",
    "quantize",
    "plan",
)
# The modules of commands whose names are not those of modules.
OTHER_MODULES = {"merge-adapters": "adapter_merge"}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def main() -> None:
    """Runs the command that the first argument names; without one, lists the commands."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(overview())
    elif name == "--version":
        print(versions())
    elif name in COMMANDS:
        if name not in ("plan", "watch"):  # these compute nothing
            allocator.tune()
        run_main(lambda arguments: module_of(name).main(arguments), arguments)
    else:
        suggestion = suggest_key(name, COMMANDS, otherwise="")
        print(f"error: {visible(name)}: unknown command{suggestion}\n\n{overview()}", file=sys.stderr)
        sys.exit(2)


def module_of(command: str) -> ModuleType:
    """Imports the module of a command."""
    return importlib.import_module(f"qlora_jax.{OTHER_MODULES.get(command, command)}")


def overview() -> str:
    """The list of commands, one line each."""
    lines = ["usage: qlora-jax COMMAND [--config FILE] [--key value ...]", ""]
    for name in COMMANDS:
        command: Command = module_of(name).COMMAND
        lines.append(f"  {name:<16}{command.summary}")
    ends = ["qlora-jax COMMAND --help shows a command's settings.", "qlora-jax --version shows the versions."]
    return "\n".join([*lines, "", *ends])


def versions() -> str:
    """The versions that a bug report needs, one per line."""
    lines = [f"{name} {importlib.metadata.version(name)}" for name in ("qlora-jax", *LIBRARIES)]
    return "\n".join([*lines, f"Python {platform.python_version()}"])


if __name__ == "__main__":
    main()
