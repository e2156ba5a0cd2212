"""`qlora-jax plan`: the memory that a run needs on a card, which may be absent, before any download."""

import json
import os
import sys

from qlora_jax.config import Command, run_main
from qlora_jax.terminal.visible import visible
from qlora_jax.training.plan.settings import PlanArgs

DOES_NOT_FIT = 1  # exit code
COMMAND = Command(
    name="plan",
    summary="Computes the memory that a training run needs on a card, and the nearest change that fits.",
    example="--model llama-3-8b --card rtx4090 --data.max_length 2048",
    schema=PlanArgs,
    flags={"json": "print every number as JSON instead of the table"},
)


def main(argv: list[str]) -> None:
    """Prints the plan; exits with 1 if the run does not fit."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed on a device of this machine
    args, flags = COMMAND.read(argv)
    # Imported after the settings are read, because importing jax takes a second.
    from qlora_jax import runtime
    from qlora_jax.api.plan import plan_of
    from qlora_jax.terminal.console import Console

    runtime.start()
    plan = plan_of(args, report=lambda line: print(line, file=sys.stderr, flush=True))
    for note in plan.notes:
        print(f"note: {visible(note)}", file=sys.stderr)
    if "json" in flags:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        plan.render(Console())
    if not plan.fits:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    run_main(main)
