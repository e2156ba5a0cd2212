"""`qlora-jax merge-adapters`: several adapters of one base as one."""

import dataclasses

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.config.adapter_merges import AdapterMergeArgs, check_adapter_merge

COMMAND = Command(
    name="merge-adapters",
    summary="Merges adapters of one base into one: their mean or sum, TIES, DARE, or the mean of a run's checkpoints.",
    example="--run runs/a --run runs/b --output runs/both",
    schema=AdapterMergeArgs,
    check=check_adapter_merge,
)


def main(argv: list[str]) -> None:
    """Merges the adapters; raises ValueError or OSError for bad input."""
    args, _ = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.merge_adapters import merge_adapters
    from qlora_jax.terminal.console import Console

    runtime.start()
    settings = dataclasses.asdict(args)
    result = merge_adapters(settings.pop("run"), settings.pop("output"), **settings, progress=True)
    Console().print(str(result), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
