"""`python -m qlora_jax.plan`: the memory that a run needs on a card, which may be absent, before any download."""

import json
import os
import sys

from qlora_jax.config import Command, run_main
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
    from rich.console import Console

    from qlora_jax import runtime
    from qlora_jax.training.plan.from_config import compiler_for, data_buckets, plan_title, step_config
    from qlora_jax.training.plan.plan import make_plan
    from qlora_jax.training.plan.target import plan_target
    from qlora_jax.training.plan.text import as_json, print_plan

    runtime.start()
    console = Console()
    target = plan_target(args.card, args.memory)
    buckets, unknown = data_buckets(args)
    if unknown:
        print(f"note: every row counts as {args.data.max_length} tokens (data.max_length): {unknown}", file=sys.stderr)
    setting = step_config(args, target, buckets)
    compile_step, why = compiler_for(target)
    if why:
        print(f"note: every number is an estimate, because nothing can be compiled: {why}", file=sys.stderr)
    usable = float(runtime.USABLE_MEMORY) * target.memory_bytes  # CUDA itself needs the rest
    plan = make_plan(setting, int(usable), compile_step, buckets)
    if "json" in flags:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print_plan(plan, plan_title(args, target, setting), console)
    if not plan.fits:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    run_main(main)
