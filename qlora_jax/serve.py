"""`qlora-jax serve`: answers requests of OpenAI's and Anthropic's clients with a base and the runs on it."""

import gc

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.server.settings import ServeArgs, check_serve

COMMAND = Command(
    name="serve",
    summary="Answers requests of OpenAI's and Anthropic's clients, with a base and any number of runs on it.",
    example="--model base.gguf --run runs/a --run runs/b",
    schema=ServeArgs,
    check=check_serve,
)


def main(argv: list[str]) -> None:
    """Serves until SIGINT or SIGTERM; raises ValueError or OSError for bad input."""
    args, _ = COMMAND.read(argv)
    gc.disable()  # until `settle`, because nearly all objects of a start stay
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.serve import open_server
    from qlora_jax.terminal.console import Console

    runtime.start()
    runtime.skip_unusable_plugins()
    server = open_server(args, progress=True)
    runtime.settle()
    messages = Console(stderr=True)
    names = ", ".join(server.models)
    messages.print(f"serving {names} at {server.url}", markup=False, highlight=False, soft_wrap=True)
    server.run()


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
